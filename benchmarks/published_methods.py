"""The speed column of docs/general.md: each published method's core at one shape of its own, on this CPU.

    python benchmarks/published_methods.py              # eager code / one call, forward and with backward
    python benchmarks/published_methods.py --cpu-time   # by processor time, where the machine is not idle
    python benchmarks/published_methods.py --quick      # shows only that it runs

MLLA, RALA, MALA and SANA are those of published_cores.py at one of its shapes. The others' eager code
follows the public code in the layout it computes in, from where a module's projections end; tests/general has
the same formulas in float64 and their commits. What a call needs made by torch first (powers, softmaxes) is
timed with it, and is the same code on both sides. Every result and gradient is compared before the timing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from published_cores import CASES, CPU, EAGER, inputs_of, modes, operator_call, tables_of
from torch import Tensor

import flatten_ext
from flatten_ext import attention, linear_attention, rotary_table
from flatten_ext.tools.bench import timing
from flatten_ext.tools.bench.check import CheckFailed, relative_error


@dataclass(frozen=True)
class Shape:
    """`size`: rows and columns, of a video frames before them."""

    size: tuple[int, ...]
    heads: int
    dim: int

    @property
    def tokens(self) -> int:
        return int(torch.Size(self.size).numel())

    @property
    def channels(self) -> int:
        return self.heads * self.dim

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


Method = Callable[[Shape], tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def convolved(v: Tensor, size: Sequence[int], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    image = v.transpose(1, 2).unflatten(2, size)
    groups = weight.shape[0]
    out = F.conv2d(
        image.reshape(-1, groups, *size), weight, bias, padding=weight.shape[-1] // 2, groups=groups
    )
    return out.reshape(image.shape).flatten(2).transpose(1, 2)


def turned(x: Tensor, table: Tensor) -> Tensor:
    """x * cos + (-b, a) * sin."""
    cosine, sine = table[..., 0].repeat_interleave(2, -1), table[..., 1].repeat_interleave(2, -1)
    return x * cosine + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sine


def inline(s: Shape):
    q, k, v = (randn(1, s.tokens, s.channels) for _ in range(3))
    taps = randn(1, s.channels, 1, 3, 3)
    scale = s.dim**-0.5

    def eager(q, k, v, taps):
        qh, kh, vh = map(s.split, (q, k, v))
        y = (qh * scale) @ (kh.transpose(-2, -1) / s.tokens @ vh)
        y = y + (1 - (qh * scale) @ kh.mean(-2, keepdim=True).transpose(-2, -1)) * vh.mean(-2, keepdim=True)
        return merged(y) + convolved(v, s.size, taps[0])

    def call(q, k, v, taps):
        return attention(
            q, k, v, s.heads, feature_map="none", normalizer="subtract", similarity_scale=scale,
            dwc_weight=taps, size=s.size,
        )  # fmt: skip

    return [q, k, v, taps], eager, call


def pola(s: Shape):
    tokens = [randn(1, s.tokens, s.channels) for _ in range(4)]
    power = (1 + 4 * randn(s.channels).detach().sigmoid()).requires_grad_()
    weight, bias = randn(s.dim, 1, 5, 5), randn(s.dim)

    def features(q, k, power):
        q, k, p = (x.unflatten(-1, (s.heads, -1)) for x in (q, k, power))
        return (*(x.relu() ** p for x in (q, -q)), *(x.relu() ** p for x in (k, -k)))

    def eager(q, k, v, gate, power, weight, bias):
        qa, qb, ka, kb = (x.transpose(1, 2) for x in features(q, k, power))
        vh, key = s.split(v), torch.cat((ka, kb), -1)
        outs = []
        for query, part in zip(
            (torch.cat((qa, qb), -1), torch.cat((qb, qa), -1)), vh.chunk(2, -1), strict=True
        ):
            z = 1 / (query @ key.mean(-2, keepdim=True).transpose(-2, -1) + 1e-6)
            outs.append(query @ ((key.transpose(-2, -1) * s.tokens**-0.5) @ (part * s.tokens**-0.5)) * z)
        image = vh.transpose(-2, -1).unflatten(-1, s.size).flatten(0, 1)
        local = F.conv2d(image, weight, bias, padding=2, groups=s.dim).flatten(2).transpose(1, 2)
        return (merged(torch.cat(outs, -1)) + merged(local.unflatten(0, (-1, s.heads)))) * gate

    def call(q, k, v, gate, power, weight, bias):
        qa, qb, ka, kb = features(q, k, power)
        key = torch.cat((ka, kb), -1).flatten(-2)
        halves = [
            [part.flatten(-2) for part in x.unflatten(-1, (s.heads, -1)).chunk(2, -1)] for x in (v, gate)
        ]
        outs = [
            linear_attention(torch.cat(signs, -1).flatten(-2), key, part, s.heads, w, b, s.size, gate=g)
            for signs, part, g, w, b in zip(
                ((qa, qb), (qb, qa)), *halves, weight.chunk(2), bias.chunk(2), strict=True
            )
        ]
        return torch.cat([out.unflatten(-1, (s.heads, -1)) for out in outs], -1).flatten(-2)

    return [*tokens, power, weight, bias], eager, call


def efficientvit(s: Shape):
    given = [randn(1, s.tokens, s.channels) for _ in range(3)]

    def eager(q, k, v):
        q, k, v = (x.transpose(1, 2).unflatten(1, (s.heads, s.dim)) for x in (q, k, v))
        v = F.pad(v, (0, 0, 0, 1), value=1.0)
        out = (v @ k.relu().transpose(-1, -2)) @ q.relu()
        return (out[:, :, :-1] / (out[:, :, -1:] + 1e-15)).flatten(1, 2).transpose(1, 2)

    def call(q, k, v):
        return attention(q, k, v, s.heads, feature_map="relu", eps=1e-15 / s.tokens)

    return given, eager, call


def linfusion(s: Shape):
    given = [randn(1, s.tokens, s.channels) for _ in range(3)]

    def eager(q, k, v):
        q, k, v = map(s.split, (q, k, v))
        q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
        z = q @ k.mean(-2, keepdim=True).transpose(-2, -1) + 1e-4
        return merged(q @ ((k.transpose(-2, -1) * s.tokens**-0.5) @ (v * s.tokens**-0.5)) / z)

    def call(q, k, v):
        return attention(q, k, v, s.heads, feature_map="elu", eps=1e-4)

    return given, eager, call


def agent(s: Shape):
    agents = 16
    spread, gather = randn(1, s.heads, s.tokens, agents), randn(1, s.heads, agents, s.tokens)
    v, weight, bias = randn(1, s.tokens, s.channels), randn(s.channels, 1, 3, 3), randn(s.channels)

    def eager(spread, gather, v, weight, bias):
        out = spread.softmax(-1) @ (gather.softmax(-1) @ s.split(v))
        return merged(out) + convolved(v, s.size, weight, bias)

    def call(spread, gather, v, weight, bias):
        q, k = merged(spread.softmax(-1)), merged(gather.softmax(-1).transpose(-2, -1))
        return linear_attention(
            q, k, v, s.heads, weight, bias, s.size, normalizer="none", similarity_scale=float(s.tokens)
        )

    return [spread, gather, v, weight, bias], eager, call


def vssd(s: Shape):
    state = 64
    x, b, c = (randn(1, s.tokens, width) for width in (s.channels, state, state))
    dt, skip = randn(1, s.tokens, s.heads), randn(s.heads)
    a = -torch.arange(1.0, s.heads + 1)

    def eager(x, b, c, dt, skip):
        v = s.split(x)
        weight = -(F.softplus(dt).transpose(1, 2).unsqueeze(-1) * a.view(1, -1, 1, 1))
        out = c[:, None] @ (b[:, None].transpose(-2, -1) @ (v * weight))
        return merged(out + v * skip.view(1, -1, 1, 1))

    def call(x, b, c, dt, skip):
        weight = -F.softplus(dt) * a
        scaled = c.unsqueeze(2) * weight.sum(1, keepdim=True).unsqueeze(-1)
        key = b.unsqueeze(2).expand(-1, -1, s.heads, -1).flatten(2)
        tap = skip.repeat_interleave(s.dim).view(-1, 1, 1, 1)
        return linear_attention(
            scaled.flatten(2), key, x, s.heads, tap, None, s.size, normalizer="none", key_weight=weight
        )

    return [x, b, c, dt, skip], eager, call


def nalaformer(s: Shape):
    tokens = [randn(1, s.tokens, s.channels) for _ in range(3)]
    weight, bias = randn(s.channels, 1, 5, 5), randn(s.channels)
    table = rotary_table(s.size, s.channels, s.heads)
    both = torch.cat((table, table), 1)

    def features(q, k):
        q, k = (x.unflatten(-1, (s.heads, -1)) for x in (q, k))
        norm = q.norm(dim=-1, keepdim=True)
        power, k = 3 * (0.5 + torch.tanh(norm)), k**3
        query = torch.cat(((q.relu() / norm) ** power, ((-q).relu() / norm) ** power), -1)
        return query, torch.cat((k.relu(), (-k).relu()), -1)

    def eager(q, k, v, weight, bias):
        query, key = (x.transpose(1, 2) for x in features(q, k))
        z = 1 / (query @ key.mean(-2, keepdim=True).transpose(-2, -1) + 1e-6)
        query, key = turned(query, both), turned(key, both)
        out = query @ ((key.transpose(-2, -1) * s.tokens**-0.5) @ (s.split(v) * s.tokens**-0.5)) * z
        return merged(out) + convolved(v, s.size, weight, bias)

    def call(q, k, v, weight, bias):
        query, key = (x.flatten(2) for x in features(q, k))
        return linear_attention(query, key, v, s.heads, weight, bias, s.size, rotary=both)

    return [*tokens, weight, bias], eager, call


def sana_video(s: Shape):
    given = [randn(1, s.tokens, s.channels) for _ in range(3)]
    table = rotary_table(s.size, s.channels, s.heads, closed=False)

    def eager(q, k, v):
        q, k, v = map(s.split, (q, k, v))
        q, k = q.relu(), k.relu()
        z = 1 / (q @ k.sum(-2, keepdim=True).transpose(-2, -1) + 1e-15)
        out = (v.transpose(-2, -1) @ turned(k, table)) @ turned(q, table).transpose(-2, -1)
        return merged(out.transpose(-2, -1) * z)

    def call(q, k, v):
        return attention(q, k, v, s.heads, feature_map="relu", rotary=table, eps=1e-15 / s.tokens)

    return given, eager, call


OTHERS: dict[str, tuple[Method, Shape]] = {
    "InLine": (inline, Shape((28, 28), 6, 32)),
    "PolaFormer": (pola, Shape((28, 28), 6, 32)),
    "EfficientViT": (efficientvit, Shape((14, 14), 16, 16)),
    "LinFusion": (linfusion, Shape((32, 32), 8, 80)),
    "Agent": (agent, Shape((28, 28), 6, 32)),
    "VSSD": (vssd, Shape((28, 28), 4, 64)),
    "NaLaFormer": (nalaformer, Shape((28, 28), 4, 32)),
    "SANA-Video": (sana_video, Shape((4, 16, 16), 20, 112)),
}
OF_CORES = {"MLLA, gated": 1, "RALA": 5, "MALA": 7, "SANA": 8}  # places among published_cores.CASES


def core(index: int, quick: bool):
    case = CASES[index]
    if quick:
        case = replace(case, size=(7, 7), heads=2)
    rotary, table = tables_of(case)
    name = f"{case.size[0]} x {case.size[1]}, {case.heads} heads of {case.dim}"
    eager = partial(EAGER[case.method], case, table)
    return name, (inputs_of(case), eager, partial(operator_call, flatten_ext, case, rotary))


def other(name: str, quick: bool):
    method, shape = OTHERS[name]
    if quick:
        shape = replace(shape, size=(*(2,) * (len(shape.size) - 2), 4, 4), heads=2)
    return f"{' x '.join(map(str, shape.size))}, {shape.heads} heads of {shape.dim}", method(shape)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="of each contender at each shape")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.cpu_time:
        timing.use_clock("cpu")
    if options.quick:
        options.seconds = 0.01
    found = {name: core(index, options.quick) for name, index in OF_CORES.items()}
    found |= {name: other(name, options.quick) for name in OTHERS}
    for name, (shape, (given, eager, call)) in found.items():
        calls = {"eager": partial(eager, *given), "flatten": partial(call, *given)}
        outs = {who: run() for who, run in calls.items()}
        grad = torch.randn(outs["eager"].shape, generator=torch.Generator().manual_seed(1))
        pairs = [(outs["flatten"], outs["eager"])]
        pairs += zip(
            *(torch.autograd.grad(outs[who], given, grad) for who in ("flatten", "eager")), strict=True
        )
        worst = max(relative_error(a, b) for a, b in pairs)
        if not worst <= 2e-3:
            raise CheckFailed(f"{name}: the call and the eager code differ by {worst:.1e}")
        ratios = []
        for mode in ("forward", "with backward"):
            contenders = {who: modes(run, given, grad)[mode] for who, run in calls.items()}
            with timing.threads(1):
                times = timing.in_turn(contenders, CPU, options.seconds, at_least=5)
            ratios.append(times["eager"].median / times["flatten"].median)
        print(f"{name} | {shape} | {ratios[0]:.1f} | {ratios[1]:.1f}", flush=True)


if __name__ == "__main__":
    main()
