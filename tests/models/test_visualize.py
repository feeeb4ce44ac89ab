"""attention_map is the matrix that the operator applies; the figures show it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from families import small
from PIL import Image

import flatten_ext
from flatten_ext.analysis import attention_map, record_attention, sharpness, softmax_map


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
def test_the_map_is_what_the_operator_applies(per_channel: bool, prefix: int) -> None:
    torch.manual_seed(0)
    heads, head_dim, size = 3, 4, (5, 6)
    tokens, channels = prefix + 30, heads * head_dim
    q, k, v = torch.randn(3, 2, tokens, channels, dtype=torch.float64)
    scale, key_bias = torch.rand(channels, dtype=torch.float64) + 0.5, torch.randn(tokens, channels).double()
    # A head's channels share one kernel here, so that their mean is each one's own.
    kernels = torch.randn(heads if per_channel else 1, 1, 3, 5, dtype=torch.float64)
    weight = kernels.repeat_interleave(head_dim, 0)
    out = flatten_ext.attention(q, k, v, heads, scale, key_bias, weight, None, size)
    maps = attention_map(q, k, heads, scale, key_bias, weight, size)
    values = v.unflatten(-1, (heads, head_dim)).transpose(1, 2)
    torch.testing.assert_close((maps.with_dwc @ values).transpose(1, 2).flatten(2), out)
    assert (maps.attention >= 0).all()
    total = maps.attention.sum(-1)  # a query of no positive channel in a head leaves the head to eps
    assert (total <= 1 + 1e-12).all()
    assert total.median() > 0.999
    assert (maps.rank() <= head_dim).all()
    assert (maps.rank(with_dwc=True) > head_dim).all()


def test_focusing_sharpens() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 49, 32)
    values = [float(attention_map(q, k, 1, focusing_factor=p).sharpness()) for p in (1, 2, 3, 4, 8)]
    assert values == sorted(values)
    assert values[-1] > 2 * values[0]


def test_sharpness() -> None:
    assert float(sharpness(torch.eye(7))) == pytest.approx(1)
    assert float(sharpness(torch.full((7, 7), 1 / 7))) == pytest.approx(0, abs=1e-6)


def test_softmax_map() -> None:
    q, k, v = torch.randn(3, 2, 9, 8, dtype=torch.float64)
    heads = [x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads)
    torch.testing.assert_close(softmax_map(q, k, 2) @ heads[2], expected)


def test_errors() -> None:
    q = torch.randn(1, 4, 8)
    with pytest.raises(ValueError, match="size"):
        attention_map(q, q, 2, dwc_weight=torch.randn(4, 1, 3, 3))
    with pytest.raises(ValueError, match="no depthwise branch"):
        attention_map(q, q, 2).rank(with_dwc=True)


@pytest.mark.parametrize("family", ["deit", "swin", "pvt_v2", "cswin"])
def test_recording(family: str) -> None:
    """What is recorded replays the model's own attention, and leaves the model as it was."""
    model = small(family, img_size=64).eval()
    x = torch.randn(1, 3, 64, 96)
    before = model(x)
    with record_attention(model) as recorded:
        torch.testing.assert_close(model(x), before)
    assert not any("attend" in vars(m) for m in model.modules())
    name, inputs = next(iter(recorded.items()))
    assert model.get_submodule(name).num_heads == inputs["num_heads"]
    maps = attention_map(**inputs)
    assert maps.with_dwc.shape[-1] == inputs["q"].shape[1]


def test_command(tmp_path: Path) -> None:
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    from flatten_ext.tools.commands import visualize as command

    y, x = np.mgrid[0:80, 0:100]
    picture = np.stack([2 * y, 2 * x, 255 * ((y - 40) ** 2 + (x - 50) ** 2 < 400)], -1).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    arguments = ["visualize", "--model", "flatten_deit_tiny", "--image", str(tmp_path / "picture.png")]
    arguments += ["--output", str(tmp_path / "out"), "--img-size", "64", "--query", "0.5,0.5"]
    result = CliRunner().invoke(app, [*arguments, "--suffix", "png"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "focused + DWC" in result.output
    for name in ("maps", "ranks"):
        assert np.asarray(Image.open(tmp_path / "out" / f"{name}.png")).std() > 10
    for wrong in (["--query", "2,2"], ["--query", "here"], ["--layer", "99"]):
        assert CliRunner().invoke(app, [*arguments, *wrong]).exit_code == 2


def test_lazy_names() -> None:
    assert flatten_ext.attention_map is attention_map
    assert timm.is_model("flatten_swin_tiny")
