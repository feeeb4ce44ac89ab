"""Times the cores of published linear attentions as calls of the general operator, on this machine's CPU.

    python benchmarks/published_cores.py              # against the published code, eager and compiled
    python benchmarks/published_cores.py --cpu-time   # by processor time, where the machine is not idle
    python benchmarks/published_cores.py --quick      # small maps, few rounds: shows only that it runs

A core is what lies between a module's projections: MLLA's with its SiLU gate at MLLA-T's stages, RALA's and
MALA's at those stages of RAVLT-S and MAViT-S that are linear, SANA's (EfficientViT's ReLU attention) at 64 x
64 tokens.
The eager cores are the published mathematics in the layout that each repository computes in. Every result
and gradient is checked against the reference in float64 before anything is timed; all contenders take turns
in one process (see flatten_ext/tools/bench/timing.py) and are compared by medians, on one thread. The last
rows say what rotation, gate and normalizer add to the same call without them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flatten_ext
from flatten_ext import attention, reference, rotary_table
from flatten_ext.tools.bench import timing
from flatten_ext.tools.bench.check import CheckFailed, relative_error

CPU = torch.device("cpu")
Core = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One shape of one published model. `taps`: 0 for none."""

    method: str
    name: str
    size: tuple[int, int]
    heads: int
    dim: int
    taps: int
    batch: int = 1

    @property
    def channels(self) -> int:
        return self.heads * self.dim

    @property
    def tokens(self) -> int:
        return self.size[0] * self.size[1]


CASES = (
    *(Case("mlla", "MLLA-T", (n, n), h, 32, 3) for n, h in ((56, 2), (28, 4), (14, 8), (7, 16))),
    *(Case("rala", "RAVLT-S", (n, n), h, 64, 5) for n, h in ((56, 1), (28, 2))),
    *(Case("mala", "MAViT-S", (n, n), h, 64, 5) for n, h in ((56, 1), (28, 2))),
    Case("sana", "SANA", (64, 64), 70, 32, 0),
)


def _turn(x: Tensor, table: Tensor) -> Tensor:
    """x * cos + (-b, a) * sin, as RALA and MALA write it; table: cosine and sine of every channel."""
    cosine, sine = table
    pairs = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cosine + pairs * sine


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _lepe(v: Tensor, case: Case, weight: Tensor, bias: Tensor) -> Tensor:
    image = v.transpose(1, 2).unflatten(2, case.size)
    out = F.conv2d(image, weight, bias, padding=case.taps // 2, groups=case.channels)
    return out.flatten(2).transpose(1, 2)


def eager_mlla(case: Case, table: Tensor, q, k, v, gate, weight, bias) -> Tensor:
    """LeapLabTHU/MLLA 66b6d29, mlla.py: complex rotation over all channels, the block's SiLU gate."""
    q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
    rq, rk = (
        torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * table).flatten(-2)
        for x in (q, k)
    )
    n = case.tokens
    q, k, rq, rk, values = (_heads(x, case.heads) for x in (q, k, rq, rk, v))
    z = 1 / (q @ k.mean(-2, keepdim=True).transpose(-2, -1) + 1e-6)
    kv = (rk.transpose(-2, -1) * n**-0.5) @ (values * n**-0.5)
    out = (rq @ kv * z).transpose(1, 2).flatten(-2)
    return (out + _lepe(v, case, weight, bias)) * F.silu(gate)


def eager_rala(case: Case, table: Tensor, q, k, v, gate, weight, bias) -> Tensor:
    """qhfan/RALA a86314f, RALA.py: importance of the keys, rotation in every head, linear gate."""
    n, lepe = case.tokens, _lepe(v, case, weight, bias)
    q, k, v = (_heads(x, case.heads) for x in (q, k, v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    importance = (q.mean(-2, keepdim=True) * case.dim**-0.5) @ k.transpose(-2, -1)
    k = k * importance.softmax(-1).transpose(-2, -1) * n
    rq, rk = _turn(q, table), _turn(k, table)
    z = 1 / (q @ k.mean(-2, keepdim=True).transpose(-2, -1) + 1e-6)
    kv = (rk.transpose(-2, -1) * n**-0.5) @ (v * n**-0.5)
    return ((rq @ kv * z).transpose(1, 2).flatten(-2) + lepe) * gate


def eager_mala(case: Case, table: Tensor, q, k, v, gate, weight, bias) -> Tensor:
    """qhfan/MALA 7114e63, model.py: the magnitude's normalizer, rotation in every head, linear gate."""
    n, scale, lepe = case.tokens, case.dim**-0.5, _lepe(v, case, weight, bias)
    q, k, v = (_heads(x, case.heads) for x in (q, k, v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    z = q @ k.mean(-2, keepdim=True).transpose(-2, -1) * scale
    rq, rk = _turn(q, table), _turn(k, table)
    kv = (rk.transpose(-2, -1) * (scale / n) ** 0.5) @ (v * (scale / n) ** 0.5)
    out = rq @ kv * (1 + 1 / (z + 1e-6)) - z * v.mean(-2, keepdim=True)
    return (out.transpose(1, 2).flatten(-2) + lepe) * gate


def eager_sana(case: Case, table: Tensor, q, k, v) -> Tensor:
    """NVlabs/Sana, LiteLA: channels first, values padded by ones, whose product is the normalizer."""
    q, k, v = (x.transpose(1, 2).unflatten(1, (case.heads, case.dim)) for x in (q, k, v))
    q, k = q.relu(), k.relu()
    v = F.pad(v, (0, 0, 0, 1), value=1.0)
    out = (v @ k.transpose(-1, -2)) @ q
    out = out[:, :, :-1] / (out[:, :, -1:] + 1e-15)
    return out.flatten(1, 2).transpose(1, 2)


EAGER = {"mlla": eager_mlla, "rala": eager_rala, "mala": eager_mala, "sana": eager_sana}


def operator_call(operators: Any, case: Case, rotary: Tensor | None, *given: Tensor) -> Tensor:
    """The same core as one call of the general operator (of RALA behind a softmax over the keys)."""
    q, k, v, *rest = given
    if case.method == "sana":
        return operators.attention(q, k, v, case.heads, feature_map="relu", eps=1e-15 / case.tokens)
    gate, weight, bias = rest
    more: dict = {}
    if case.method == "mlla":
        more = {"gate_activation": "silu"}
    elif case.method == "mala":
        more = {"normalizer": "magnitude", "similarity_scale": case.dim**-0.5}
    elif case.method == "rala":
        # The mean of phi(q) and its products with phi(k), by the state operators: values of one channel.
        ones = q.new_ones(*q.shape[:2], case.heads)
        total = operators.attention_state(q, ones, case.heads, feature_map="elu")[:, :, :-1, :1]
        corner = F.pad(total.new_ones(1, 1, 1, 1), (1, 0, case.dim, 0))  # W = 1
        state = F.pad(total * (case.dim**-0.5 / case.tokens), (0, 1, 0, 1)) + corner
        logits = operators.attention_from_state(k, state, case.heads, feature_map="elu", normalizer="none")
        more = {"key_weight": logits.softmax(1)}
    return operators.attention(
        q, k, v, case.heads, feature_map="elu", size=list(case.size), dwc_weight=weight, dwc_bias=bias,
        rotary=rotary, gate=gate, **more,
    )  # fmt: skip


def inputs_of(case: Case, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.tokens, case.channels)
    tokens = [torch.randn(shape, generator=generator) for _ in range(4 if case.taps else 3)]
    if case.taps:
        weight = torch.randn(case.channels, 1, case.taps, case.taps, generator=generator) / case.taps
        tokens += [weight, torch.randn(case.channels, generator=generator)]
    return [t.requires_grad_() for t in tokens]


def tables_of(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """Ours (n, R, 2), and as the eager core holds it."""
    if case.method == "sana":
        return None, None
    if case.method == "mlla":
        table = rotary_table(case.size, case.channels)
        return table, torch.view_as_complex(table)
    table = rotary_table(case.size, case.channels, heads=case.heads, closed=True)
    return table, table.repeat_interleave(2, 1).movedim(-1, 0).contiguous()


def check(
    case: Case, calls: dict[str, Core], given: Sequence[Tensor], rotary: Tensor | None, grad: Tensor
) -> None:
    """Raises CheckFailed unless every contender agrees with the reference in float64."""
    exact = [t.detach().double().requires_grad_() for t in given]
    expected = operator_call(reference, case, None if rotary is None else rotary.double(), *exact)
    wanted = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    for name, call in calls.items():
        out = call(*given)
        for got, want in zip((out, *torch.autograd.grad(out, given, grad)), wanted, strict=True):
            if not relative_error(got, want) <= 3e-4:
                raise CheckFailed(f"{name} at {case}: error {relative_error(got, want):.1e}")


def extras(case: Case, rotary: Tensor, given: Sequence[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """MALA's call, and what is left of it without rotation, gate and the magnitude's normalizer."""
    q, k, v, gate, weight, bias = given
    plain = partial(
        attention,
        q,
        k,
        v,
        case.heads,
        feature_map="elu",
        size=list(case.size),
        dwc_weight=weight,
        dwc_bias=bias,
    )
    whole = partial(plain, rotary=rotary, gate=gate, normalizer="magnitude", similarity_scale=case.dim**-0.5)
    return {"plain": plain, "with": whole}


def modes(
    call: Callable[[], Tensor], given: Sequence[Tensor], grad: Tensor
) -> dict[str, Callable[[], object]]:
    def forward() -> Tensor:
        with torch.no_grad():
            return call()

    def training() -> object:
        return torch.autograd.grad(call(), given, grad)

    return {"forward": forward, "with backward": training}


def mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="of each contender at each shape")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.cpu_time:
        timing.use_clock("cpu")
    cases = CASES
    if options.quick:
        cases = tuple(Case(c.method, c.name, (7, 7), min(c.heads, 2), c.dim, c.taps) for c in CASES[::2])
        options.seconds, options.no_compile = 0.01, True
    ratios: dict[tuple[str, str], list[float]] = {}
    added: dict[str, list[float]] = {}
    for case in cases:
        given, (rotary, table) = inputs_of(case), tables_of(case)
        grad = torch.randn(given[2].shape, generator=torch.Generator().manual_seed(1))
        eager = partial(EAGER[case.method], case, table)
        calls: dict[str, Core] = {"eager": eager}
        if not options.no_compile:
            torch._dynamo.reset()  # else shapes beyond its limit of recompilations run as eager code
            calls["compile"] = torch.compile(eager, dynamic=False)
        calls["flatten"] = partial(operator_call, flatten_ext, case, rotary)
        check(case, calls, given, rotary, grad)
        bound = {name: partial(call, *given) for name, call in calls.items()}
        if case.method == "mala":
            assert rotary is not None
            bound |= extras(case, rotary, given)
        for mode in ("forward", "with backward"):
            # A gradient of what a call does not read is no part of it.
            def reads(name: str, given=given) -> Sequence[Tensor]:
                return [t for i, t in enumerate(given) if not (name == "plain" and i == 3)]

            contenders = {name: modes(call, reads(name), grad)[mode] for name, call in bound.items()}
            with timing.threads(1):
                times = timing.in_turn(contenders, CPU, options.seconds, at_least=5)
            ours = times["flatten"].median
            line = f"{case.name} {case.size[0]}x{case.size[1]} C={case.channels}, {mode}: {ours:.3f} ms"
            for name in ("eager", "compile"):
                if name in times:
                    ratio = times[name].median / ours
                    ratios.setdefault((name, mode), []).append(ratio)
                    line += f", {name} {ratio:.2f} x"
            if "plain" in times:
                more = times["with"].median / times["plain"].median
                added.setdefault(mode, []).append(more)
                line += f", of the plain call {100 * (more - 1):+.1f} %"
            print(line, flush=True)
    for (name, mode), found in ratios.items():
        print(f"geometric mean, {mode}, against {name}: {mean(found):.2f} x")
    for mode, found in added.items():
        print(f"rotation, gate and normalizer, {mode}: {100 * (mean(found) - 1):+.1f} %")


if __name__ == "__main__":
    main()
