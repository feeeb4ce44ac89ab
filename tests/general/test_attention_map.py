"""attention_map of the general form: the matrix by which v is multiplied."""

from __future__ import annotations

import pytest
import torch
from general_cases import NAMED, drawn
from torch import Tensor, nn

from flatten_ext import FocusedLinearAttention, attention_map, reference
from flatten_ext.analysis import record_attention

MAPPED = {
    f"drawn {seed}": drawn(seed)
    for seed in range(150)
    if drawn(seed).window is None and drawn(seed).taps != "channel"
} | {name: case for name, case in NAMED.items() if case.window is None}


@pytest.mark.parametrize("name", MAPPED)
def test_the_matrix_times_v(name: str) -> None:
    case = MAPPED[name]
    a = case.arguments(seed=4)
    heads, v, bias = a["num_heads"], a.pop("v"), a.pop("dwc_bias", None)
    for of_output in ("gate", "gate_activation"):
        a.pop(of_output, None)
    taps, shared = a.pop("dwc_weight", None), a.copy()
    a.pop("size", None)
    a.setdefault("feature_map", "none")
    maps = attention_map(**a, value_dim=v.shape[-1] // heads)
    values = v.unflatten(-1, (heads, -1)).transpose(1, 2)
    out = (maps.attention @ values).transpose(1, 2).flatten(-2)
    expected = getattr(reference, case.operator)(v=v, **shared)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    if taps is None or taps.dim() == 5 or taps.shape[0] != v.shape[-1] // heads:
        return
    # Taps that channels of a head share, so that the band is one matrix.
    taps = taps[:1].expand_as(taps)
    with_taps = attention_map(**a, value_dim=v.shape[-1] // heads, dwc_weight=taps, size=case.size)
    out = (with_taps.with_dwc @ values).transpose(1, 2).flatten(-2)
    expected = getattr(reference, case.operator)(v=v, dwc_weight=taps, **shared)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    assert bias is None or bias.shape == taps.shape[:1]


def test_taps_of_each_image() -> None:
    q, k, v = torch.randn(3, 2, 12, 6, dtype=torch.float64)
    taps = torch.randn(2, 2, 1, 1, 3, 3, dtype=torch.float64).expand(2, 2, 3, 1, 3, 3).flatten(1, 2)
    maps = attention_map(q, k, 2, dwc_weight=taps, size=(3, 4))
    out = (maps.with_dwc @ v.unflatten(-1, (2, 3)).transpose(1, 2)).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(out, reference.attention(q, k, v, 2, dwc_weight=taps, size=(3, 4)))


def test_a_key_of_weight_0_is_not_there() -> None:
    q, k = torch.randn(2, 1, 12, 6, dtype=torch.float64)
    weight = (torch.arange(12) < 7).double()[None]
    k = torch.where(weight[..., None] == 0, torch.nan, k)
    for normalizer in reference.NORMALIZERS:
        options = {"feature_map": "elu", "normalizer": normalizer}
        found = attention_map(q, k, 2, key_weight=weight, **options).attention
        torch.testing.assert_close(found[..., :7], attention_map(q, k[:, :7], 2, **options).attention)
        assert not found[..., 7:].any()
    assert not attention_map(q, k, 2, key_weight=0 * weight, feature_map="elu").attention.any()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        options = {"feature_map": "elu", "rotary": "heads", "gate": "silu", "normalizer": "magnitude"}
        self.attention = FocusedLinearAttention(16, 2, **options, dtype=torch.float64)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attention(x, (4, 6), key_padding_mask=mask)


def test_recorded_attentions_are_drawn() -> None:
    pytest.importorskip("matplotlib")
    from flatten_ext.tools.figures import four_maps

    model, x = Model(), torch.randn(2, 24, 16, dtype=torch.float64)
    mask = torch.arange(24)[None].expand(2, -1) >= 20
    with record_attention(model) as recorded:
        out = model(x, mask)
    (inputs,) = recorded.values()
    maps = attention_map(**inputs)
    assert not maps.attention[..., 20:].any()
    layer = model.attention
    v = layer.qkv(x)[..., 32:].masked_fill(mask[..., None], 0)
    attended = (maps.attention @ v.unflatten(-1, (2, 8)).transpose(1, 2)).transpose(1, 2).flatten(-2)
    attended = attended + reference.depthwise_conv(v, layer.dwc.weight, layer.dwc.bias, (4, 6))
    expected = layer.proj(attended * torch.nn.functional.silu(layer.gate(x)))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    drawn_maps = four_maps(inputs)
    assert list(drawn_maps) == ["softmax", "linear (elu)", "general", "general + DWC"]
    assert all(matrix.shape == (2, 24, 24) for matrix in drawn_maps.values())
