"""The operators as documented Python functions; each is one call of torch.ops.flatten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _load as _load  # registers torch.ops.flatten

__all__ = ["attention", "depthwise_conv", "linear_attention"]

# The overloads themselves: a call of torch.ops.flatten.attention first finds out which is meant.
_attention = torch.ops.flatten.attention.default
_linear_attention = torch.ops.flatten.linear_attention.default
_depthwise_conv = torch.ops.flatten.depthwise_conv.default


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    scale: Tensor | None = None,
    key_bias: Tensor | None = None,
    dwc_weight: Tensor | None = None,
    dwc_bias: Tensor | None = None,
    size: Sequence[int] | None = None,
    window: Sequence[int] | None = None,
    shift: Sequence[int] | None = None,
    focusing_factor: float = 3.0,
    eps: float = 1e-6,
) -> Tensor:
    """Focused linear attention (FLatten Transformer, arXiv 2308.00442, equations 4-6), in linear time.

    Per window, which is the whole map unless `window` is given::

        phi(x) = y**p * |y| / |y**p|        y = (relu(x) + eps) / scale, norms over all C channels of a token
        Q, K   = phi(q), phi(k + key_bias)
        S_h    = K_h^T V_h / M,  m_h = mean of K_h
        out    = concat_h((Q_h S_h) / (Q_h . m_h + eps)) + depthwise_conv(v)

    Arguments behind `num_heads` are meant to be given by name.

    Args:
        q: (B, N, C) projected queries; C = num_heads * head_dim; float32, float16, bfloat16 or float64.
        k, v: (B, M, C) projected keys and values, in q's dtype. M may differ from N only without `window` and
            `dwc_weight`. Any layout whose channels are adjacent is read in place.
        num_heads: channel c belongs to head c // head_dim.
        scale: (C,) positive; the ReLU features are **divided** by it (the `scale` of torch's
            scaled_dot_product_attention multiplies). float32 or q's dtype, as every parameter below.
        key_bias: (M, C), with windows (wh*ww, C): positional encoding added to k before the ReLU.
        dwc_weight: (head_dim, 1, kh, kw) shared by the heads, or (C, 1, kh, kw); kh and kw odd.
        dwc_bias: (head_dim,) or (C,), as the weight.
        size: (H, W), the map that the tokens tile in raster order; needed with `dwc_weight` and `window`. The
            M - H*W leading tokens (class, registers) attend but are not convolved; none with windows.
        window: (wh, ww) dividing (H, W): attend and convolve inside each window; tokens stay in raster order.
        shift: (sh, sw) smaller than the window: the window grid lies on the map rolled by (-sh, -sw).
        focusing_factor: p of phi, at least 1; the paper uses 3. Like eps a number that float32 holds (float64
            with float64 tokens).
        eps: added to the features and to the normaliser, at least 0.

    Returns:
        (B, N, C) in q's dtype. Sums, norms, S and m accumulate in float32 (float64 for float64 inputs).

    Raises:
        RuntimeError: naming the argument, what was expected and what came, before anything is computed. The
            values of `scale` are checked on the CPU only.

    Example:
        >>> import torch
        >>> from flatten_ext import attention
        >>> q, k, v = torch.randn(3, 8, 14 * 14, 96)  # 8 images of 14 x 14 tokens of 96 channels
        >>> weight = torch.randn(96 // 3, 1, 5, 5)  # shared by the 3 heads
        >>> attention(q, k, v, 3, dwc_weight=weight, size=(14, 14), window=(7, 7)).shape
        torch.Size([8, 196, 96])
    """
    return _attention(
        q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift, focusing_factor, eps
    )


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    dwc_weight: Tensor | None = None,
    dwc_bias: Tensor | None = None,
    size: Sequence[int] | None = None,
    window: Sequence[int] | None = None,
    shift: Sequence[int] | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The attention of `attention` on features that are mapped already: Q = q and K = k, no phi.

    Any other mapping (ELU + 1, exp, a learned one) runs on the same kernels. Arguments, shapes, dtypes and
    errors as in `attention`.

    Example:
        >>> import torch
        >>> from flatten_ext import linear_attention
        >>> q, k, v = torch.randn(3, 8, 196, 96)
        >>> linear_attention(torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1, v, 3).shape
        torch.Size([8, 196, 96])
    """
    return _linear_attention(q, k, v, num_heads, dwc_weight, dwc_bias, size, window, shift, eps)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    window: Sequence[int] | None = None,
    shift: Sequence[int] | None = None,
) -> Tensor:
    """The rank-restoring branch alone: a zero-padded depthwise convolution of tokens on their map.

    Args:
        x: (B, P + H*W, C) tokens in raster order; the P leading ones give 0.
        weight: (D, 1, kh, kw), kh and kw odd, D dividing C: channel c is filtered by kernel c % D.
        bias: (D,) or None.
        size, window, shift: as in `attention`.

    Returns:
        (B, P + H*W, C) in x's dtype.

    Raises:
        RuntimeError: as `attention`.

    Example:
        >>> import torch
        >>> from flatten_ext import depthwise_conv
        >>> x, weight = torch.randn(8, 1 + 14 * 14, 96), torch.randn(32, 1, 5, 5)  # with a class token
        >>> depthwise_conv(x, weight, None, size=(14, 14)).shape
        torch.Size([8, 197, 96])
    """
    return _depthwise_conv(x, weight, bias, size, window, shift)
