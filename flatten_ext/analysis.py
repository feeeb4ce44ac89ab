"""Attention to look at: the matrix that focused linear attention never forms, its rank and its sharpness."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from ._focused import FocusedAttention

__all__ = [
    "AttentionMap",
    "attention_map",
    "depthwise_matrix",
    "read_matrices",
    "record_attention",
    "sharpness",
    "softmax_map",
]


@dataclass(frozen=True)
class AttentionMap:
    """Equivalent attention matrices, (B, heads, N, M) float64: (map + depthwise) @ v, then bias and gate.

    With features of one sign and the normalizer "divide", rows of `attention` are non-negative weights whose
    sum falls short of 1 by eps alone; rotated or signed features give weights of both signs.
    """

    attention: Tensor
    with_dwc: Tensor | None  # the same plus the band of the depthwise branch; None without one

    def rank(self, with_dwc: bool = False) -> Tensor:
        """(B, heads) numerical rank, at most head_dim without the band (paper, section 4.3)."""
        return torch.linalg.matrix_rank(self._select(with_dwc))

    def sharpness(self, with_dwc: bool = False) -> Tensor:
        """(B, heads) mean sharpness of the rows, see `sharpness`."""
        return sharpness(self._select(with_dwc))

    def _select(self, with_dwc: bool) -> Tensor:
        if not with_dwc:
            return self.attention
        if self.with_dwc is None:
            raise ValueError("this attention has no depthwise branch")
        return self.with_dwc


def attention_map(
    q: Tensor,
    k: Tensor,
    num_heads: int,
    scale: Tensor | None = None,
    key_bias: Tensor | None = None,
    dwc_weight: Tensor | None = None,
    size: Sequence[int] | None = None,
    focusing_factor: float = 3.0,
    eps: float = 1e-6,
    *,
    feature_map: str = "focused",
    rotary: Tensor | None = None,
    key_weight: Tensor | None = None,
    normalizer: str = "divide",
    similarity_scale: float = 1.0,
    normalizer_q: Tensor | None = None,
    normalizer_k: Tensor | None = None,
    value_dim: int | None = None,
) -> AttentionMap:
    """The N x M matrix that `flatten_ext.attention` multiplies v by, computed in float64.

    Arguments as of `flatten_ext.attention`, whole map (no window), and of `flatten_ext.linear_attention` with
    the feature map "none"; `value_dim` is D_v where it is not D_k. A gate is no part of the matrix: it
    multiplies what comes out. The depthwise branch is one matrix for each channel; `with_dwc` adds their
    mean over the channels of a head. Memory is B * heads * N * M numbers: meant for maps of some thousand
    tokens.

    Raises:
        ValueError: `dwc_weight` without `size`; of the others, what `flatten_ext.attention` refuses.
    """

    def double(x: Tensor | None) -> Any:
        return None if x is None else x.detach().double()

    q, k, key_bias, scale = double(q), double(k), double(key_bias), double(scale)
    if key_bias is not None:
        k = k + key_bias
    q, k = (reference.features(x, feature_map, scale, focusing_factor, eps) for x in (q, k))
    (qn, qd), (kn, kd) = (
        reference.by_head(x, double(given), double(rotary), num_heads)
        for x, given in ((q, normalizer_q), (k, normalizer_k))
    )
    weight: Any = q.new_ones(1, k.shape[1], 1) if key_weight is None else reference.weights(key_weight, q)
    weight = weight.transpose(-2, -1).unsqueeze(-2)  # (B, heads, 1, M), or 1 for what is the same for all
    total = weight.sum(-1, keepdim=True)
    share = weight / torch.where(total == 0, 1.0, total)
    # A key of weight 0 is not there, even if it is NaN.
    y, z = (
        torch.where(share == 0, 0.0, similarity_scale * (queries @ keys.mT) * share)
        for queries, keys in ((qn, kn), (qd, kd))
    )
    z = z.sum(-1, keepdim=True)
    attention = reference.choose("normalizer", normalizer, reference.NORMALIZERS)(
        y, torch.where(total == 0, 1.0, z), share, eps
    )
    attention = torch.where(total == 0, 0.0, attention)
    if dwc_weight is None:
        return AttentionMap(attention, None)
    if size is None:
        raise ValueError("dwc_weight needs size")
    taps = double(dwc_weight)
    value_dim = q.shape[-1] // num_heads if value_dim is None else value_dim
    kernels = taps.reshape(-1, value_dim, *taps.shape[-2:]).mean(1)
    band = torch.stack([depthwise_matrix(kernel, size) for kernel in kernels])
    if taps.dim() == 5:  # each image's own
        band = band.unflatten(0, (-1, num_heads))
    prefix = k.shape[-2] - band.shape[-1]
    return AttentionMap(attention, attention + F.pad(band, (prefix, 0, prefix, 0)))


def read_matrices(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, channels: slice = slice(None)
) -> Tensor:
    """What any attention does to its values, read off by applying it to unit values, one token at a time.

    Args:
        attend: (q, k, v), each (B, N, C), -> (B, N, C); linear in v, but for a constant.
        q, k: (1, N, C).
        channels: which ones to look at.

    Returns:
        (channels, N, N): each channel's matrix; row i holds the weights of all tokens in token i.
    """
    tokens = q.shape[1]
    q, k = q.expand(tokens + 1, -1, -1), k.expand(tokens + 1, -1, -1)
    units = torch.eye(tokens, dtype=q.dtype, device=q.device)[:, :, None].expand(-1, -1, q.shape[-1])
    out = attend(q, k, torch.cat((units, torch.zeros_like(units[:1]))))
    return (out[:-1] - out[-1:])[:, :, channels].permute(2, 1, 0)


def depthwise_matrix(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """The (H*W, H*W) matrix of a zero-padded convolution with one (kh, kw) kernel."""
    height, width = size
    kh, kw = kernel.shape
    tokens = height * width
    impulses = torch.eye(tokens, dtype=kernel.dtype, device=kernel.device).unflatten(0, (height, width))
    responses = F.conv2d(
        impulses.permute(2, 0, 1).unsqueeze(1), kernel[None, None], padding=(kh // 2, kw // 2)
    )
    return responses.flatten(1).T


def softmax_map(q: Tensor, k: Tensor, num_heads: int) -> Tensor:
    """(B, heads, N, M) softmax attention of the same queries and keys, in float64."""
    q, k = (x.detach().double().unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k))
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)


def sharpness(attention: Tensor) -> Tensor:
    """(..., N, M) -> (...): 1 - H / ln M averaged over the rows: 0 for uniform rows, 1 for one-hot ones.

    H is the entropy of a row's absolute weights, normalised to sum to 1.
    """
    weights = attention.abs()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    entropy = torch.special.entr(weights).sum(-1)
    return (1 - entropy / math.log(max(attention.shape[-1], 2))).mean(-1)


@contextmanager
def record_attention(model: nn.Module) -> Any:
    """Within the context, `model` leaves the inputs of its focused attentions in the dict that is yielded.

    The key is the attention's name in the model, the value a dict of `attention_map` arguments. Attentions
    in windows, or over reduced keys, which are no single N x N matrix, are left out, and those whose
    depthwise layer is more than its weights (see flatten_ext._layers).
    """
    recorded: dict[str, dict[str, Any]] = {}
    attentions: list[tuple[str, Any]] = [
        (name, m) for name, m in model.named_modules() if isinstance(m, FocusedAttention)
    ]

    def recorder(name: str, module: FocusedAttention) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, size: Any, window: Any = None, *args: Any, **kwargs: Any):
            weight, _, called = module._depthwise_branch(v.device)
            if window is None and q.shape == k.shape and not called:
                encoding = module.encoding(size)
                of_map = {n: x for n, x in kwargs.items() if n in ("rotary", "key_weight")}
                recorded[name] = {
                    "q": q.detach(),
                    "k": k.detach(),
                    "num_heads": module.num_heads,
                    **module.form(),
                    "key_bias": None if encoding is None else encoding[0],
                    "dwc_weight": weight,
                    "size": tuple(size),
                    **of_map,
                }
            return type(module).attend(module, q, k, v, size, window, *args, **kwargs)

        return attend

    for name, module in attentions:
        setattr(module, "attend", recorder(name, module))  # noqa: B010 - it shadows the method
    try:
        yield recorded
    finally:
        for _, module in attentions:
            del module.attend
