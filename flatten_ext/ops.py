"""The operators as documented Python functions; each is one call of torch.ops.flatten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _load as _load  # registers torch.ops.flatten

__all__ = ["attention", "attention_from_state", "attention_state", "depthwise_conv", "linear_attention"]

# The overloads themselves: a call of torch.ops.flatten.attention first finds out which is meant.
_attention = torch.ops.flatten.attention.default
_linear_attention = torch.ops.flatten.linear_attention.default
_depthwise_conv = torch.ops.flatten.depthwise_conv.default
_attention_state = torch.ops.flatten.attention_state.default
_attention_from_state = torch.ops.flatten.attention_from_state.default


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
    *,
    feature_map: str = "focused",
    rotary: Tensor | None = None,
    key_weight: Tensor | None = None,
    normalizer: str = "divide",
    similarity_scale: float = 1.0,
    gate: Tensor | None = None,
    gate_activation: str = "none",
) -> Tensor:
    """Focused linear attention (FLatten Transformer, arXiv 2308.00442, equations 4-6), in linear time.

    Per window, which is the whole map unless `window` is given::

        phi(x) = y**p * |y| / |y**p|        y = (relu(x) + eps) / scale, norms over all C channels of a token
        Q, K   = phi(q), phi(k + key_bias)
        S_h    = K_h^T V_h / M,  m_h = mean of K_h
        out    = concat_h((Q_h S_h) / (Q_h . m_h + eps)) + depthwise_conv(v)

    The arguments after the `*` widen it to the linear attentions that followed, in any combination. With key
    weights w (1 by default) and W = sum_j w_j, per window and head::

        S   = sum_j w_j Kn_j v_j^T / W    m = sum_j w_j K_j / W    u = sum_j w_j v_j / W    (W = 0: all are 0)
        y_i = c Qn_i S                    z_i = c Q_i . m          Qn, Kn: Q and K rotated by `rotary`
        out = act(gate) * (normalizer(y, z, u) + depthwise_conv(v))

    Arguments behind `num_heads` are meant to be given by name.

    Args:
        q: (B, N, C) projected queries; C = num_heads * head_dim; float32, float16, bfloat16 or float64.
        k, v: (B, M, C) projected keys and values, in q's dtype. M may differ from N only without `window` and
            `dwc_weight`. Any layout whose channels are adjacent is read in place.
        num_heads: channel c belongs to head c // head_dim.
        scale: (C,) positive; the ReLU features are **divided** by it (the `scale` of torch's
            scaled_dot_product_attention multiplies). float32 or q's dtype, as every parameter below.
        key_bias: (M, C), with windows (wh*ww, C): positional encoding added to k before the ReLU.
        dwc_weight: (head_dim, 1, kh, kw) shared by the heads, or (C, 1, kh, kw), or (B, C, 1, kh, kw), taps
            of each image's own, without `dwc_bias`; kh and kw odd.
        dwc_bias: (head_dim,) or (C,), as the weight.
        size: (H, W), the map that the tokens tile in raster order; needed with `dwc_weight` and `window`. The
            M - H*W leading tokens (class, registers) attend but are not convolved; none with windows.
        window: (wh, ww) dividing (H, W): attend and convolve inside each window; tokens stay in raster order.
        shift: (sh, sw) smaller than the window: the window grid lies on the map rolled by (-sh, -sw).
        focusing_factor: p of phi, at least 1; the paper uses 3. Like eps a number that float32 holds (float64
            with float64 tokens).
        eps: added to the features of "focused" and to what the normalizer divides by, at least 0.
        feature_map: what Q and K are made by: "focused", the phi above; "elu", elu(x) + 1; "relu", max(x, 0);
            "none", mapped already, of any sign. `scale` and `focusing_factor` belong to "focused";
            `key_bias` is added before any map.
        rotary: (n, R, 2) cosines and sines (`flatten_ext.rotary_table`) by which the channel pairs (2i, 2i+1)
            of the n tokens of a window are rotated, prefix included, in the numerator alone: R = C/2 for
            every pair its own, R = head_dim/2 for the same in every head. Needs N = M. It has no gradient.
            float32 or q's dtype; float64 with float64.
        key_weight: (B, M) or (B, M, num_heads) of w, at least 0: padding masks (0 drops a key, NaN included,
            but not from the convolution), importances. Has a gradient. dtype as of `rotary`, never bool.
        normalizer: "divide", y / (z + eps); "none", y; "subtract", y + (1 - z) u; "magnitude",
            (1 + 1 / (z + eps)) y - z u.
        similarity_scale: c.
        gate: (B, N, C) in q's dtype, a factor of the output.
        gate_activation: what is done to the gate before: "none", "silu" or "sigmoid".

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
    if (  # the dispatcher takes half as long without arguments by keyword
        feature_map == "focused" and rotary is None and key_weight is None and normalizer == "divide"
        and similarity_scale == 1 and gate is None and gate_activation == "none"
    ):  # fmt: skip
        return _attention(
            q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift, focusing_factor,
            eps,
        )  # fmt: skip
    return _attention(
        q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift, focusing_factor, eps,
        feature_map=feature_map, rotary=rotary, key_weight=key_weight, normalizer=normalizer,
        similarity_scale=similarity_scale, gate=gate, gate_activation=gate_activation,
    )  # fmt: skip


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
    *,
    normalizer_q: Tensor | None = None,
    normalizer_k: Tensor | None = None,
    rotary: Tensor | None = None,
    key_weight: Tensor | None = None,
    normalizer: str = "divide",
    similarity_scale: float = 1.0,
    gate: Tensor | None = None,
    gate_activation: str = "none",
) -> Tensor:
    """The attention of `attention` on features that are mapped already: Q = q and K = k, no phi.

    Any other mapping (exp, a learned one) runs on the same kernels. Arguments, shapes, dtypes and errors as
    in `attention`, but for:

    Args:
        v: (B, M, num_heads * D_v); D_v may differ from the channels of q's and k's heads. The output, the
            gate and the taps have v's channels.
        normalizer_q, normalizer_k: as q and k, in their dtype: the features of z and m where they are not q
            and k before rotation.

    Example:
        >>> import torch
        >>> from flatten_ext import linear_attention
        >>> q, k, v = torch.randn(3, 8, 196, 96)
        >>> linear_attention(torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1, v, 3).shape
        torch.Size([8, 196, 96])
    """
    if (
        normalizer_q is None and normalizer_k is None and rotary is None and key_weight is None
        and normalizer == "divide" and similarity_scale == 1 and gate is None and gate_activation == "none"
    ):  # fmt: skip
        return _linear_attention(q, k, v, num_heads, dwc_weight, dwc_bias, size, window, shift, eps)
    return _linear_attention(
        q, k, v, num_heads, dwc_weight, dwc_bias, size, window, shift, eps,
        normalizer_q=normalizer_q, normalizer_k=normalizer_k, rotary=rotary, key_weight=key_weight,
        normalizer=normalizer, similarity_scale=similarity_scale, gate=gate, gate_activation=gate_activation,
    )  # fmt: skip


def attention_state(
    k: Tensor,
    v: Tensor,
    num_heads: int,
    scale: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    focusing_factor: float = 3.0,
    eps: float = 1e-6,
    feature_map: str = "focused",
    rotary: Tensor | None = None,
    key_weight: Tensor | None = None,
    normalizer_k: Tensor | None = None,
) -> Tensor:
    """All that `attention` knows of its keys, additive over them: `sum_j w_j [Kn_j; 1] [v_j; 1]^T`.

    States of parts of the keys add up to the state of the whole: of shards of an image (all-reduce), frames
    of a video (running sums), tokens that come later. Gradients go through states. There are no windows and
    no taps: `depthwise_conv` is beside it.

    Args:
        k: (B, M, C) keys.
        v: (B, M, num_heads * D_v) values.
        rotary: (M, R, 2), the keys' table.
        normalizer_k: as k, with feature_map "none" alone: the last column's keys, where they are not k.
        num_heads, scale, key_bias, focusing_factor, eps, feature_map, key_weight: as in `attention`.

    Returns:
        (B, num_heads, D_k + 1, D_v + 1) in float32, for float64 keys in float64: the sums of S and, in the
        last column, of m; in the last row of u, and W. Nothing is divided by W.

    Raises:
        RuntimeError: as `attention`.

    Example:
        >>> import torch
        >>> from flatten_ext import attention_from_state, attention_state
        >>> q, k, v = torch.randn(3, 2, 100, 32)
        >>> state = attention_state(k[:, :40], v[:, :40], 2) + attention_state(k[:, 40:], v[:, 40:], 2)
        >>> attention_from_state(q, state, 2).shape  # attention to all 100 keys
        torch.Size([2, 100, 32])
    """
    return _attention_state(
        k, v, num_heads, scale, key_bias, focusing_factor=focusing_factor, eps=eps, feature_map=feature_map,
        rotary=rotary, key_weight=key_weight, normalizer_k=normalizer_k,
    )  # fmt: skip


def attention_from_state(
    q: Tensor,
    state: Tensor,
    num_heads: int,
    scale: Tensor | None = None,
    *,
    focusing_factor: float = 3.0,
    eps: float = 1e-6,
    feature_map: str = "focused",
    rotary: Tensor | None = None,
    normalizer_q: Tensor | None = None,
    normalizer: str = "divide",
    similarity_scale: float = 1.0,
    gate: Tensor | None = None,
    gate_activation: str = "none",
) -> Tensor:
    """The attention of q to the keys of an `attention_state`, without taps.

    Args:
        q: (B, N, C) queries.
        state: (B, num_heads, D_k + 1, D_v + 1) of `attention_state`, or a sum of such; float32, float64 with
            float64 queries.
        rotary: (N, R, 2), the queries' table.
        normalizer_q: as q, with feature_map "none" alone: the queries of z, where they are not q.
        num_heads, scale, focusing_factor, eps, feature_map: as of the state.
        normalizer, similarity_scale, gate, gate_activation: as in `attention`.

    Returns:
        (B, N, num_heads * D_v) in q's dtype; of a state without keys (W = 0) zeros.

    Raises:
        RuntimeError: as `attention`; the heads or sizes of the state do not fit q.

    Example:
        See `attention_state`.
    """
    return _attention_from_state(
        q, state, num_heads, scale, focusing_factor=focusing_factor, eps=eps, feature_map=feature_map,
        rotary=rotary, normalizer_q=normalizer_q, normalizer=normalizer, similarity_scale=similarity_scale,
        gate=gate, gate_activation=gate_activation,
    )  # fmt: skip


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
        weight: (D, 1, kh, kw), kh and kw odd, D dividing C: channel c is filtered by kernel c % D. Or
            (B, C, 1, kh, kw), taps of each image's own, without bias.
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
