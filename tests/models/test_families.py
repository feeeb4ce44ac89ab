"""MILA, RAVLT, MAViT, InLine and PolaFormer, weight for weight the published models.

tests/golden/families.json.gz has configuration, parameters, multiply-adds and every key of the 34 published
variants; tests/golden/family_*.npz what the public models computed, at the commits named in
flatten_ext/models/_cores.py.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import golden_data
import pytest
import timm
import torch
from golden_data import Golden, unit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import flatten_ext
from flatten_ext.models import checkpoint_filter

with gzip.open(golden_data.FOLDER / "families.json.gz") as file:
    PUBLIC: dict[str, Any] = json.load(file)
SIZES = {"T": "tiny", "S": "small", "B": "base", "L": "large"}
# What the public models keep in their state_dicts and ours make anew for every size.
REBUILT = ("relative_position_index", "attn_mask", "rope.rotations", "RoPE.angle")


def our_name(public: str) -> str:
    """RAVLT_T -> ravlt_tiny, MALA_T -> mavit_tiny, mlla_tiny -> mila_tiny, ..."""
    if match := re.fullmatch(r"(RAVLT|MALA)_(\w)", public):
        return f"{'ravlt' if match[1] == 'RAVLT' else 'mavit'}_{SIZES[match[2]]}"
    name = public.replace("mlla", "mila").replace("_patch4_224", "")
    return name.replace("_patch4_384_finetune", "_384")


def test_all_are_registered() -> None:
    assert len(PUBLIC) == 34
    assert set(map(our_name, PUBLIC)) <= set(timm.list_models())


@pytest.mark.parametrize("public", PUBLIC)
def test_configuration(public: str) -> None:
    """Parameters, multiply-adds, drop path, and a state_dict of exactly the public keys and shapes."""
    expected = PUBLIC[public]
    side = expected["img_size"]
    with torch.device("meta"):
        model = timm.create_model(our_name(public)).eval()
        state_dict = {key: torch.empty(shape) for key, shape, *_ in expected["keys"]}
        image = torch.empty(1, 3, side, side)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["params"]
    assert model.pretrained_cfg["input_size"] == (3, side, side)
    loaded = {key: value.shape for key, value in checkpoint_filter(model)(state_dict, model).items()}
    assert loaded == {key: value.shape for key, value in model.state_dict().items()}
    assert len(loaded) == len([key for key in state_dict if not key.endswith(REBUILT)])

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert counter.get_total_flops() == 2 * expected["macs"]

    rates = [module.drop_prob for module in model.modules() if isinstance(module, timm.layers.DropPath)]
    assert rates[-1] == pytest.approx(expected["config"]["drop_path_rate"])


def parameter(key: str, shape: tuple[int, ...]) -> Tensor:
    """The number that the recipe of the goldens puts into the public state_dict's entry `key`."""
    last = key.rpartition(".")[2]
    if last == "num_batches_tracked":
        return torch.tensor(0)
    values = unit(key, shape)
    if last in ("positional_encoding", "relative_position_bias_table", "cls_token", "running_mean"):
        return 0.1 * values
    if last.startswith("pos_embed"):
        return 0.1 * values
    if last in ("scale", "power"):
        return 0.5 * values
    if last == "bias":
        return 0.05 * values
    if last == "running_var":
        return 1 + 0.2 * values
    if last.startswith("gamma_") or len(shape) == 1:
        return 1 + 0.1 * values
    return values / math.sqrt(math.prod(shape[1:]))


MODELS = [name.removeprefix("family_") for name in golden_data.names("family_")]


def load_by_recipe(golden: Golden) -> nn.Module:
    """Our model at the recorded size, with the recorded parameters."""
    height, width = golden.meta["imgshape"][2:]
    model = timm.create_model(our_name(golden.meta["variant"]), img_size=(height, width)).double().eval()
    keys, shapes = golden.strings("sd.keys"), golden.strings("sd.shapes")
    shapes = [tuple(json.loads(shape)) for shape in shapes]
    state_dict = {
        key: torch.zeros(shape) if key.endswith(REBUILT) else parameter(key, shape)
        for key, shape in zip(keys, shapes, strict=True)
    }
    model.load_state_dict(checkpoint_filter(model)(state_dict, model))
    return model


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", MODELS)
def test_logits(case: str) -> None:
    golden = Golden(f"family_{case}")
    model = load_by_recipe(golden)
    image = unit("input", tuple(golden.meta["imgshape"]))
    expected = golden["logits64_t64" if "logits64_t64" in golden else "logits64"]
    with torch.inference_mode():
        assert relative(model(image), expected) < 1e-10
        assert relative(model.float()(image.float()), golden["logits32"]) < 1e-5


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "state_dict_ema", "model_ema", None])
def test_published_layouts(wrapper: str | None, tmp_path: Path) -> None:
    """Files as the public code writes them, at a size of their own, into models of another."""
    for public in ("mlla_tiny", "RAVLT_T", "inline_deit_tiny", "inline_cswin_tiny"):
        if wrapper in ("state_dict", "model_ema") and public != "RAVLT_T":
            continue
        shapes = {key: tuple(shape) for key, shape, *_ in PUBLIC[public]["keys"]}
        state_dict = {key: torch.full(shape, i) for i, (key, shape) in enumerate(shapes.items())}
        old = {key: torch.zeros_like(value) for key, value in state_dict.items()}
        checkpoint: Any = {"epoch": 3} if wrapper == "state_dict" else {"model": old, "epoch": 3}
        checkpoint = state_dict if wrapper is None else {**checkpoint, wrapper: state_dict}
        torch.save(checkpoint, tmp_path / "file.pth")
        model = timm.create_model(our_name(public), img_size=(64, 96))
        flatten_ext.load_official(model, tmp_path / "file.pth")
        kept = [i for i, key in enumerate(shapes) if not key.endswith(REBUILT)]
        values = sorted({int(value.flatten()[0]) for value in model.state_dict().values()})
        assert values == kept, public


def test_one_entry_more_or_less_is_said(tmp_path: Path) -> None:
    for public in ("mlla_tiny", "RAVLT_T", "pola_pvt_tiny"):
        state_dict = {key: torch.zeros(shape) for key, shape, *_ in PUBLIC[public]["keys"]}
        *_, missing = (key for key in state_dict if key.endswith("attn.proj.weight") or "cpe2.weight" in key)
        del state_dict[missing]
        state_dict["novel"] = torch.zeros(1)
        torch.save(state_dict, tmp_path / "file.pth")
        model = timm.create_model(our_name(public))
        with pytest.raises(ValueError, match=r"missing: stages[^\n]*\n[^\n]*unexpected: novel"):
            flatten_ext.load_official(model, tmp_path / "file.pth")
