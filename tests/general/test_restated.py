"""Published linear attentions without recorded numbers: the public code's formula, restated in float64.

A restatement follows the order of the public code, heads in front, and knows nothing of the general form;
beside it stands the one call that equals it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from implementations import every_implementation

from flatten_ext.rotary import rotary_table

B, HEADS, D, SIZE = 2, 2, 8, (3, 5)
N, C = SIZE[0] * SIZE[1], HEADS * D


def tokens(seed: int, *widths: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(B, N, width, generator=rng, dtype=torch.float64).requires_grad_() for width in widths]


def by_head(x: torch.Tensor, heads: int = HEADS) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merged(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def turned(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Channel pairs as complex numbers times e^(i angle); x (..., N, 2 n), angle (N, n)."""
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def angles(theta: torch.Tensor, length: int, before: int, behind: int) -> torch.Tensor:
    """position * theta along one axis of a raster, with so many places before and behind it."""
    position = torch.arange(length, dtype=torch.float64)
    return position.repeat_interleave(behind).repeat(before)[:, None] * theta


def linfusion(operators):
    """Huage001/LinFusion 62ef289, src/linfusion/attention.py: GeneralizedLinearAttention.forward.

    Its q and k come from a non-linear projection; the attention itself has elu + 1 and an eps of 1e-4.
    """
    q, k, v = inputs = tokens(1, C, C, C)
    query, key, value = (by_head(x) for x in (q, k, v))
    query, key = F.elu(query) + 1.0, F.elu(key) + 1.0
    z = query @ key.mean(-2, keepdim=True).transpose(-2, -1) + 1e-4
    kv = (key.transpose(-2, -1) * N**-0.5) @ (value * N**-0.5)
    call = operators.attention(q, k, v, HEADS, feature_map="elu", eps=1e-4)
    return merged(query @ kv / z), call, inputs


def vssd(operators, groups: int = 1):
    """YuHengsss/VSSD 87b753b, classification/models/mamba2.py: Mamba2.non_casual_linear_attn, ngroups = 1.

    One key and one query (B and C there) for all heads of v (x there); a key's weight in a head is -dt * A,
    positive, and D * x is a tap of 1 x 1. Sums, not means: the factor W of the queries undoes the division.
    """
    heads, state = 4, 6
    x, b, c = inputs = tokens(2, heads * D, state, state)
    rng = torch.Generator().manual_seed(3)
    dt = F.softplus(torch.randn(B, N, heads, generator=rng, dtype=torch.float64)).requires_grad_()
    a = -torch.arange(1, heads + 1, dtype=torch.float64)
    skip = torch.randn(heads, generator=rng, dtype=torch.float64).requires_grad_()
    v = x.unflatten(-1, (heads, D)).transpose(1, 2)
    da = -(dt.transpose(1, 2).unsqueeze(-1) * a.view(1, -1, 1, 1))
    kv = b[:, None].transpose(-2, -1) @ (v * da)
    expected = c[:, None] @ kv + v * skip.view(1, -1, 1, 1)
    weight = -dt * a
    scaled = c.repeat(1, 1, heads).unflatten(-1, (heads, state)) * weight.sum(1, keepdim=True).unsqueeze(-1)
    call = operators.linear_attention(
        scaled.flatten(2), b.repeat(1, 1, heads), x, heads, skip.repeat_interleave(D).view(-1, 1, 1, 1), None,
        SIZE, normalizer="none", key_weight=weight,
    )  # fmt: skip
    return merged(expected), call, [*inputs, dt, skip]


def nalaformer(operators):
    """ZacharyMeng/NaLaFormer 1f1c10a, NaLaformer/NALA.py: NormAwareLinearAttn.forward, up to its LayerNorm.

    Positive and negative parts side by side, 2d wide: of q's direction, to a power that grows with its norm,
    and of k cubed. Both parts are turned by the head's angles. LayerNorm and the SiLU gate come behind.
    """
    q, k, v = inputs = tokens(4, C, C, C)
    rng = torch.Generator().manual_seed(5)
    weight = torch.randn(C, 1, 5, 5, generator=rng, dtype=torch.float64).requires_grad_()
    bias = torch.randn(C, generator=rng, dtype=torch.float64).requires_grad_()
    theta = 1.0 / (10000 ** torch.linspace(0, 1, D // 4, dtype=torch.float64))
    angle = torch.cat((angles(theta, SIZE[0], 1, SIZE[1]), angles(theta, SIZE[1], SIZE[0], 1)), -1)
    query, key, value = (by_head(x) for x in (q, k, v))
    key = key**3
    norm = query.norm(dim=-1, keepdim=True)
    power = 3 * (0.5 + torch.tanh(norm))
    q1, q2 = (torch.relu(query) / norm) ** power, (torch.relu(-query) / norm) ** power
    k1, k2 = torch.relu(key), torch.relu(-key)
    rotated_q = torch.cat((turned(q1, angle), turned(q2, angle)), -1)
    rotated_k = torch.cat((turned(k1, angle), turned(k2, angle)), -1)
    plain_q, plain_k = torch.cat((q1, q2), -1), torch.cat((k1, k2), -1)
    z = 1 / (plain_q @ plain_k.mean(-2, keepdim=True).transpose(-2, -1) + 1e-6)
    kv = (rotated_k.transpose(-2, -1) * N**-0.5) @ (value * N**-0.5)
    image = v.transpose(1, 2).unflatten(2, SIZE)
    lepe = F.conv2d(image, weight, bias, padding=2, groups=C).flatten(2).transpose(1, 2)
    expected = merged(rotated_q @ kv * z) + lepe
    table = rotary_table(SIZE, C, HEADS, dtype=torch.float64)
    call = operators.linear_attention(
        merged(plain_q), merged(plain_k), v, HEADS, weight, bias, SIZE, rotary=torch.cat((table, table), 1)
    )  # fmt: skip
    return expected, call, [*inputs, weight, bias]


def sana_video(operators):
    """huggingface/diffusers 6ad82e5, transformers/transformer_sana_video.py: SanaLinearAttnProcessor3_0.

    The port of LiteLAReLURope in NVlabs/Sana. ReLU, then rotation by frame, row and column, in the numerator
    alone; sums with an eps of 1e-15, which is 1e-15 / N of means.
    """
    frames, (h, w), width = 2, (2, 3), 14
    n = frames * h * w
    rng = torch.Generator().manual_seed(6)
    inputs = [
        torch.randn(B, n, HEADS * width, generator=rng, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    ]
    of_axis = 2 * (width // 6)
    dims = (width - 2 * of_axis, of_axis, of_axis)
    parts = []
    for dim, length, before, behind in zip(
        dims, (frames, h, w), (1, frames, frames * h), (h * w, w, 1), strict=True
    ):
        theta = 1.0 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        parts.append(angles(theta, length, before, behind))
    angle = torch.cat(parts, -1)
    query, key, value = (by_head(x) for x in inputs)
    query, key = F.relu(query), F.relu(key)
    z = 1 / (query @ key.sum(-2, keepdim=True).transpose(-2, -1) + 1e-15)
    scores = value.transpose(-2, -1) @ turned(key, angle)
    expected = merged((scores @ turned(query, angle).transpose(-2, -1)).transpose(-2, -1) * z)
    table = rotary_table((frames, h, w), HEADS * width, HEADS, closed=False, dtype=torch.float64)
    call = operators.attention(*inputs, HEADS, feature_map="relu", rotary=table, eps=1e-15 / n)
    return expected, call, inputs


METHODS = {"LinFusion": linfusion, "VSSD": vssd, "NaLaFormer": nalaformer, "SANA-Video": sana_video}


def errors(operators, method: str) -> tuple[float, float]:
    """The largest difference of the output, and of any gradient, relative to the largest number."""
    expected, call, inputs = METHODS[method](operators)
    grad_out = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    pairs = zip(
        torch.autograd.grad(call, inputs, grad_out, retain_graph=True),
        torch.autograd.grad(expected, inputs, grad_out),
        strict=True,
    )
    gradients = max(float((found - want).abs().max() / want.abs().max()) for found, want in pairs)
    with torch.no_grad():
        return float((call - expected).abs().max() / expected.abs().max()), gradients


@every_implementation
@pytest.mark.parametrize("method", METHODS)
def test_one_call_equals_the_restatement(operators, method):
    assert max(errors(operators, method)) <= 1e-12
