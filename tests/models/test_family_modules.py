"""Attention modules and blocks of MILA, RALA, MALA, InLine and PolaFormer against the public ones: outputs
and every gradient in float64, outputs in float32."""

from __future__ import annotations

import re
from typing import Any

import golden_data
import pytest
import timm
import timm.models.pvt_v2
import timm.models.vision_transformer
import torch
from golden_data import Golden
from torch import Tensor, nn

from flatten_ext.models import _choice, _cores, cswin, mila, ravlt

FAMILIES = ("mlla", "rala", "mala", "inline", "pola")
CASES = [name for family in FAMILIES for name in golden_data.names(f"{family}_")]


def softmax(meta: dict[str, Any]) -> nn.Module:
    """timm's attention, whose projections the module takes over."""
    dim, heads = meta["dim"], meta["heads"]
    if meta.get("family") == "pvt":
        return timm.models.pvt_v2.Attention(dim, heads, sr_ratio=meta.get("sr", 1))
    return timm.models.vision_transformer.Attention(dim, heads, qkv_bias=meta.get("qkv_bias", True))


def build(golden: Golden) -> nn.Module:
    meta = golden.meta
    dim, heads, size = meta["dim"], meta["heads"], (meta["H"], meta["W"])
    method, kind, family = meta["method"], meta["kind"], meta.get("family")
    if method == "MLLA":
        return mila.MilaBlock(dim, heads) if kind == "block" else mila.Attention(dim, heads, meta["qkv_bias"])
    if method in ("RALA", "MALA"):
        packed = {"RALA": _choice.PackedRala, "MALA": _choice.PackedMala}[method]
        if kind == "softmax":
            packed = _choice.PackedRotarySoftmax
        attention = packed(softmax(meta), size)
        return ravlt.RavltBlock(attention, dim) if kind == "block" else attention
    if method == "InLine" and kind == "block":
        stripe = _choice.choose("inline", "stripe")
        return cswin.CSWinBlock("L", dim, heads, size, None, attention=stripe)
    if method == "InLine":
        place = _choice.PyramidInline if family == "pvt" else _choice.PackedInline
        kernel = {"kernel_func": meta["kernel_func"]} if "kernel_func" in meta else {}
        return place(softmax(meta), size, num_prefix_tokens=int(family == "deit"), **kernel)
    place = _choice.PyramidPolar if family == "pvt" else _choice.PackedPolar
    return place(softmax(meta), size, kernel_size=meta["kernel"], alpha=meta["alpha"])


def our_key(key: str) -> str:
    key = key.removeprefix("m.")
    key = re.sub(r"norm(\d)\.norm", r"norm\1", key)
    return re.sub(r"gamma_(\d)", r"ls\1.gamma", key)


def load(module: nn.Module, golden: Golden) -> dict[str, str]:
    """Loads the recorded parameters; our name of each."""
    recorded = golden.under("param.")
    names = {key: our_key(key) for key in recorded if not key.endswith(("rotations", "angle"))}
    shapes = {key: value.shape for key, value in module.state_dict().items()}
    module.double().load_state_dict(
        {name: recorded[key].reshape(shapes[name]) for key, name in names.items()}
    )
    return names


def recorded_table(golden: Golden) -> Tensor | None:
    """The rotations that the public module used: made in float32."""
    recorded = golden.under("param.")
    for key, value in recorded.items():
        if key.endswith("rotations"):
            return value.flatten(0, 1)
        if key.endswith("angle"):
            theta, (height, width) = value[::2], (golden.meta["H"], golden.meta["W"])
            rows = torch.arange(height).double().repeat_interleave(width)
            columns = torch.arange(width).double().repeat(height)
            angle = torch.cat((rows[:, None] * theta, columns[:, None] * theta), 1)
            return torch.stack((angle.cos(), angle.sin()), -1)
    return None


def run(module: nn.Module, golden: Golden, x: Tensor) -> Tensor:
    """The module on tokens; maps as the public modules have them become tokens and back."""
    size = (golden.meta["H"], golden.meta["W"])
    if x.dim() == 3:
        return module(x, size)
    return module(x.flatten(2).transpose(1, 2), size).transpose(1, 2).unflatten(2, size)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_output(case: str) -> None:
    golden = Golden(case)
    module = build(golden).eval()
    load(module, golden)
    expected = golden["out.y_t64" if "out.y_t64" in golden else "out.y"]
    with torch.no_grad():
        # The public code rounds elu(x) + 1 against 1, which eps shows where features are as small.
        assert relative(run(module, golden, golden["in.x"]), expected) < 1e-10
        single = run(module.float(), golden, golden["in.x"].float())
        assert relative(single, expected) < (1e-4 if case == "mlla_m04_eps" else 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, table = Golden(case), recorded_table(Golden(case))
    if table is not None:
        monkeypatch.setattr(_cores, "kept_table", lambda *_: table)
    module = build(golden).eval()
    names = load(module, golden)
    x = golden["in.x"].clone().requires_grad_()
    out = run(module, golden, x)
    assert relative(out.detach(), golden["out.y"]) < 1e-10
    out.backward(golden["in.dy"])
    parameters = dict(module.named_parameters())
    largest = max(float(grad.abs().max()) for grad in golden.under("grad.").values())
    for key, expected in golden.under("grad.").items():
        grad = x.grad if key == "x" else parameters[names[key]].grad
        bound = 1e-9 * float(expected.abs().max()) + 1e-13 * largest
        assert (grad.reshape(expected.shape) - expected).abs().max() < bound, key


def test_a_kernel_function_is_chosen_by_name() -> None:
    config = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "img_size": 64}
    torch.manual_seed(0)
    plain = timm.create_model("inline_swin_tiny", **config).eval()
    image = torch.randn(1, 3, 64, 64)
    logits = []
    for name in ("identity", "relu", "leakyrelu", "exp"):
        model = timm.create_model("inline_swin_tiny", kernel_func=name, **config).eval()
        model.load_state_dict(plain.state_dict())
        assert model.layers[0].blocks[0].attn.kernel_func == name
        logits.append(model(image))
    torch.testing.assert_close(logits[0], plain(image))
    assert all(not torch.allclose(a, b) for i, a in enumerate(logits) for b in logits[:i])
    with pytest.raises(ValueError, match="kernel_func is 'elu', expected one of 'identity', 'relu'"):
        timm.create_model("inline_swin_tiny", kernel_func="elu", **config)
    assert timm.create_model("pola_swin_tiny", alpha=2, **config).layers[0].blocks[0].attn.alpha == 2
    with pytest.raises(ValueError, match="kernel_func is 'relu', but the attention 'pola' reads no"):
        timm.create_model("pola_swin_tiny", kernel_func="relu", **config)
