"""load_official: published files, whole, at their own or another resolution."""

from __future__ import annotations

import json
from pathlib import Path

import golden_data
import pytest
import timm
import torch
from families import small
from torch import Tensor, nn

import flatten_ext
from flatten_ext.models import checkpoint_filter

PUBLIC = json.loads((golden_data.FOLDER / "models.json").read_text())
TINY = {
    "flatten_pvt_tiny": "flatten_pvt_tiny",
    "flatten_pvt_v2_b0": "flatten_pvt_v2_b0",
    "flatten_swin_t": "flatten_swin_tiny",
    "flatten_cswin_t": "flatten_cswin_tiny",
}


def published(public: str, path: Path) -> Path:
    """A file as the authors publish them: {'model': ...}, the buffers of the public code included."""
    state_dict = {key: torch.full(shape, 0.01).half() for key, shape in PUBLIC[public]["state_dict"].items()}
    state_dict |= dict.fromkeys(PUBLIC[public]["buffers"], torch.zeros(1))
    torch.save({"model": state_dict, "epoch": 300, "max_accuracy": 82.1}, path)
    return path


@pytest.mark.parametrize("public", TINY)
@pytest.mark.parametrize("img_size", [224, (160, 288)])
def test_load_official(public: str, img_size: int | tuple[int, int], tmp_path: Path) -> None:
    model = timm.create_model(TINY[public], img_size=img_size)
    assert flatten_ext.load_official(model, published(public, tmp_path / "model.pth")) is model
    for name, parameter in model.named_parameters():  # resampling keeps a constant
        torch.testing.assert_close(
            parameter, torch.full_like(parameter, 0.01), rtol=1e-3, atol=1e-5, msg=name
        )


def filled(model: nn.Module) -> dict[str, Tensor]:
    """A state_dict of the model with other values, and its metadata."""
    state_dict = model.state_dict()
    for key, value in state_dict.items():
        state_dict[key] = torch.rand_like(value)
    return state_dict


def test_differences_are_named(tmp_path: Path) -> None:
    model = small("pvt_v2")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state_dict = filled(model)
    del state_dict["stages.1.norm.weight"]
    state_dict["stages.9.extra"] = torch.zeros(1)
    state_dict["head.weight"] = torch.zeros(1000, 64)
    torch.save(state_dict, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="does not fit") as error:
        flatten_ext.load_official(model, tmp_path / "bad.pth")
    message = str(error.value)
    assert "missing: stages.1.norm.weight" in message
    assert "unexpected: stages.9.extra" in message
    assert "shape: head.weight is (1000, 64), the model has (10, 64)" in message
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["deit", "swin", "pvt", "pvt_v2", "cswin"])
def test_own_checkpoints(family: str, tmp_path: Path) -> None:
    """What we save loads again, averaged weights first, and at another size."""
    model = small(family, img_size=96).eval()
    state_dict = filled(model)
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": state_dict}, tmp_path / "own.pt")
    flatten_ext.load_official(model, tmp_path / "own.pt")
    torch.testing.assert_close(dict(model.state_dict()), state_dict)
    larger = small(family, img_size=128)
    flatten_ext.load_official(larger, tmp_path / "own.pt")
    assert checkpoint_filter(larger)(state_dict, larger).keys() == larger.state_dict().keys()


def test_new_classifier(tmp_path: Path) -> None:
    model, other = small("swin"), small("swin", num_classes=7)
    state_dict = filled(other)
    torch.save(state_dict, tmp_path / "other.pth")
    classifier = model.head.fc.weight.detach().clone()
    flatten_ext.load_official(model, tmp_path / "other.pth", new_classifier=True)
    torch.testing.assert_close(model.head.fc.weight, classifier, rtol=0, atol=0)
    torch.testing.assert_close(model.norm.weight, state_dict["norm.weight"], rtol=0, atol=0)


def test_other_models_are_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(TypeError, match="Linear"):
        flatten_ext.load_official(nn.Linear(2, 2), tmp_path / "empty.pth")
