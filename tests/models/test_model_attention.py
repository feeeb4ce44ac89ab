"""The attention modules against the public modules, their parameters and their gradients included."""

from __future__ import annotations

import golden_data
import pytest
import torch
import torch.nn.functional as F
from golden_data import Golden
from timm.layers import Attention
from timm.models import pvt_v2, swin_transformer
from torch import nn

from flatten_ext import reference
from flatten_ext.models._attention import FocusedAttention, PackedAttention, PyramidAttention
from flatten_ext.models.swin import FlattenSwinBlock


def module_for(golden: Golden) -> nn.Module:
    """What our models put where the recorded public module stands."""
    meta = golden.meta
    dim, heads, size = meta["C"], meta["heads"], (meta["H"], meta["W"])
    focus = {"focusing_factor": meta["p"], "kernel_size": meta["kernel"]}
    if meta["family"] == "swin" and meta["kind"] == "module":
        return PackedAttention(Attention(dim, heads, qkv_bias=True), size, **focus)
    if meta["family"] == "swin":
        block = swin_transformer.SwinTransformerBlock(
            dim, size, heads, window_size=meta["window"], mlp_ratio=2
        )
        assert meta["shift"] == meta["window"] // 2
        return FlattenSwinBlock(block, (meta["window"],) * 2, shifted=True, **focus)
    if meta["kind"] == "module":
        softmax = pvt_v2.Attention(dim, heads, sr_ratio=meta["sr_ratio"])
        return PyramidAttention(softmax, size, **focus)
    block = pvt_v2.Block(dim, heads, mlp_ratio=2, qkv_bias=True)
    block.attn = PyramidAttention(block.attn, size, **focus)
    return block


@pytest.mark.parametrize("name", golden_data.names("mod_"))
def test_public_module(name: str) -> None:
    golden = Golden(name)
    module = module_for(golden).double()
    parameters = golden.under("param.")
    module.load_state_dict({key.replace("dwconv.dwconv", "dwconv"): p for key, p in parameters.items()})
    x = golden["in.x"].requires_grad_()
    size = (golden.meta["H"], golden.meta["W"])
    if isinstance(module, FlattenSwinBlock):
        out = module(x.unflatten(1, size)).flatten(1, 2)
    else:
        out = module(x, size)
    torch.testing.assert_close(out, golden["out.y"], rtol=0, atol=1e-12)
    out.backward(golden["in.dy"])
    ours = {key: p.grad for key, p in module.named_parameters()} | {"x": x.grad}
    for key, grad in golden.under("grad.").items():
        torch.testing.assert_close(ours[key], grad, rtol=1e-10, atol=1e-11, msg=key)


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_lepe_joins_the_shared_kernel(kernel_size: int) -> None:
    module = FocusedAttention(12, 3, (5, 4), kernel_size=kernel_size, lepe=True, dtype=torch.float64)
    q, k, v = torch.randn(3, 2, 20, 12, dtype=torch.float64)
    image = v.transpose(1, 2).unflatten(2, (5, 4))
    separate = (
        reference.attention(q, k, v, 3, F.softplus(module.scale).flatten())
        + reference.depthwise_conv(v, module.dwc.weight, module.dwc.bias, (5, 4))
        + module.get_v(image).flatten(2).transpose(1, 2)
    )
    torch.testing.assert_close(module.attend(q, k, v, (5, 4)), separate)


def test_pooled_keys() -> None:
    """PVTv2 `linear`: 49 keys, whose values are resampled along the tokens for the depthwise branch."""
    softmax = pvt_v2.Attention(8, 2, linear_attn=True)
    module = PyramidAttention(softmax, (10, 12)).double()
    x = torch.randn(2, 120, 8, dtype=torch.float64)
    image = module.sr(module.pool(x.transpose(1, 2).unflatten(2, (10, 12))))
    keys = module.act(module.norm(image.flatten(2).transpose(1, 2)))
    k, v = module.kv(keys).chunk(2, -1)
    out = reference.attention(
        module.q(x), k, v, 2, F.softplus(module.scale).flatten(), module.positional_encoding[0]
    )
    long = F.interpolate(v.transpose(1, 2), size=120, mode="linear").transpose(1, 2)
    out = out + reference.depthwise_conv(long, module.dwc.weight, module.dwc.bias, (10, 12))
    torch.testing.assert_close(module(x, (10, 12)), module.proj(out))


def test_packed_projection_is_read_in_place() -> None:
    """The one new allocation of q, k and v is the projection; their gradients arrive as one tensor."""
    module = PackedAttention(Attention(16, 4, qkv_bias=True), (4, 4))
    seen = {}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
        seen.update(q=q, k=k, v=v)
        return q + k + v

    module.attend = attend
    module(torch.randn(2, 16, 16), (4, 4)).sum().backward()
    assert len({t.untyped_storage().data_ptr() for t in seen.values()}) == 1
    assert {type(t.grad_fn).__name__ for t in seen.values()} == {"UnbindBackward0"}


@pytest.mark.parametrize("bad", [{"kernel_size": 4}, {"num_heads": 5}])
def test_errors(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"kernel_size|num_heads"):
        FocusedAttention(**{"dim": 16, "num_heads": 4, "grid": (4, 4), **bad})
