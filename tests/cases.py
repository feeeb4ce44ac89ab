"""Calls to compare with the oracle, on any device: shapes and options by name, tensors from a seed, errors in
one number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from flatten_ext import reference


class Tolerance(NamedTuple):
    """Relative errors allowed of the output and of the gradients, in the Frobenius norm, against float64 on
    the same rounded inputs. No entry may be off by more than ten times as much of the largest entry."""

    out: float
    gradient: float


# The bounds follow from u, the largest relative error of one rounding to the dtype: 1.1e-16, 6.0e-8, 4.9e-4
# and 3.9e-3.
# - float64, float32: everything is computed in the dtype, and errors of sums grow with their length. CPU
#   kernels show 4 u (out) and 22 u (gradient of scale, summed over 4096 tokens). Allowed are 16 u and 50 u
#   in float32, and about 1000 u in float64: one sum left in float32 would exceed that a thousand times over.
# - float16, bfloat16: everything is computed in float32 and rounded once, which alone makes 0.44 u of a whole
#   tensor. Allowed are 1.25 u, and about twice that for gradients, which may combine two rounded tensors.
TOLERANCE = {
    torch.float64: Tolerance(1e-13, 1e-13),
    torch.float32: Tolerance(1e-6, 3e-6),
    torch.float16: Tolerance(6e-4, 1.2e-3),
    torch.bfloat16: Tolerance(5e-3, 8e-3),
}
# The tensor-core kernels also round what they multiply to the dtype: phi(q), phi(k), S and their gradients.
# Each of these adds an error of the size of the last rounding's. Seen are 2.3 u in bfloat16, at p = 1 and 8.
TENSOR_CORE_TOLERANCE = TOLERANCE | {torch.bfloat16: Tolerance(5e-3, 1e-2)}

EMULATED = os.environ.get("CUDAEMU") == "1"  # the CUDA device is the emulator
DTYPES = list(TOLERANCE)
TENSORS = ("q", "k", "v", "scale", "key_bias", "dwc_weight", "dwc_bias")


@dataclass(frozen=True)
class Case:
    """One call of `attention`, or of `linear_attention` where p is None."""

    size: tuple[int, int] = (6, 5)
    heads: int = 2
    head_dim: int = 16
    batch: int = 2
    prefix: int = 0
    keys: int | None = None  # other than the queries
    window: tuple[int, int] | None = None
    shift: tuple[int, int] | None = None
    kernel: tuple[int, int] | None = (5, 5)
    per_channel: bool = False
    bias: bool = True
    scale: bool = True
    key_bias: bool = True
    p: float | None = 3.0
    eps: float = 1e-6
    magnitude: float = 1.0  # of q, k and key_bias
    value_magnitude: float = 1.0
    tap_size: float = 0.2  # 0: the convolution cannot hide errors of the attention
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None  # q's
    layout: str = "contiguous"  # of q, k and v; see `lay_out`

    def __str__(self) -> str:
        default = Case()
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return " ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in changed.items()) or "default"

    @property
    def operator(self) -> str:
        return "linear_attention" if self.p is None else "attention"

    @property
    def windows(self) -> int:
        """Windows of the whole batch."""
        height, width = self.size if self.window is None else self.window
        return self.batch * (self.size[0] * self.size[1]) // (height * width)

    def arguments(self, dtype=None, device="cpu", param_dtype=None, seed=0) -> dict:
        """Keyword arguments of the operator. The values depend on the seed alone, not on the device."""
        rng = torch.Generator().manual_seed(seed)
        dtype = dtype or self.dtype
        param_dtype = param_dtype or self.param_dtype or dtype

        def random(*shape, dtype=dtype):
            return (torch.randn(*shape, generator=rng, dtype=torch.float64)).to(dtype).to(device)

        def tokens(count: int, magnitude: float) -> Tensor:
            x = random(self.batch, count, c) * magnitude
            return lay_out(x.abs() + 0.1 if self.p is None else x, self.layout)

        n = self.prefix + self.size[0] * self.size[1]
        m = n if self.keys is None else self.keys
        c = self.heads * self.head_dim
        arguments: dict = {
            "q": tokens(n, self.magnitude),
            "k": tokens(m, self.magnitude),
            "v": lay_out(random(self.batch, m, c) * self.value_magnitude, self.layout),
            "num_heads": self.heads,
            "eps": self.eps,
        }
        if self.p is not None:
            arguments["focusing_factor"] = self.p
        if self.p is not None and self.scale:
            arguments["scale"] = random(c, dtype=param_dtype).abs() + 0.5
        if self.p is not None and self.key_bias:
            rows = m if self.window is None else self.window[0] * self.window[1]
            arguments["key_bias"] = 0.3 * random(rows, c, dtype=param_dtype) * self.magnitude
        if self.kernel is not None:
            filters = c if self.per_channel else self.head_dim
            arguments["dwc_weight"] = self.tap_size * random(filters, 1, *self.kernel, dtype=param_dtype)
            if self.bias:
                arguments["dwc_bias"] = random(filters, dtype=param_dtype) * (self.tap_size > 0)
        if self.kernel is not None or self.window is not None:
            arguments["size"] = list(self.size)
        if self.window is not None:
            arguments["window"] = list(self.window)
        if self.shift is not None:
            arguments["shift"] = list(self.shift)
        return arguments


def on_map(height: int, width: int, **changed) -> Case:
    """The attention alone on a map, in heads of 32: no taps and no key_bias but those asked for."""
    return Case(size=(height, width), **{"head_dim": 32, "kernel": None, "key_bias": False, **changed})


def half(case: Case, dtype: torch.dtype = torch.bfloat16) -> Case:
    """The case as mixed-precision training calls it: float32 parameters."""
    return replace(case, dtype=dtype, param_dtype=torch.float32)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (B, N, C), laid out as models lay them out."""
    if layout == "contiguous":
        return x
    batch, _, channels = x.shape
    if layout == "packed":  # q of a packed projection
        return torch.stack([x, x, x], 2).flatten(2)[..., channels : 2 * channels]
    if layout == "misaligned":  # channels start one element off every vector boundary
        return torch.cat([x[..., :1], x, x[..., :2]], -1)[..., 1 : channels + 1]
    if layout == "padded":  # tokens and channels inside a larger tensor
        padded = x.new_zeros(batch, x.shape[1] + 3, channels + 5)
        padded[:, 2:-1, 3:-2] = x
        return padded[:, 2:-1, 3:-2]
    if layout == "tokens first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "batch last":  # channels are not adjacent: copied once
        return x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if layout == "channels first":  # copied once too
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return x[:1].expand(batch, -1, -1)
    raise ValueError(layout)


LAYOUTS = ["packed", "misaligned", "padded", "tokens first", "batch last", "channels first"]

CASES = {
    "plain": Case(kernel=None, scale=False, key_bias=False),
    "taps": Case(),
    "no-bias": Case(bias=False),
    "taps-3x7": Case(kernel=(3, 7), size=(9, 8)),
    "taps-7x3": Case(kernel=(7, 3), size=(9, 8)),
    "taps-1x1": Case(kernel=(1, 1)),
    "taps-larger-than-map": Case(kernel=(11, 9), size=(4, 3)),
    "per-channel": Case(per_channel=True, kernel=(3, 3)),
    "prefix": Case(prefix=3, size=(5, 7)),
    "cross": Case(kernel=None, keys=13, size=(4, 5)),
    "windows": Case(window=(3, 5), size=(6, 10)),
    "windows-7x7": Case(window=(7, 7), size=(14, 14), heads=3, head_dim=32, batch=1),
    "shifted": Case(window=(3, 5), size=(6, 10), shift=(1, 2)),
    "shifted-single-window": Case(window=(6, 5), shift=(2, 4)),
    "strips": Case(window=(8, 2), size=(8, 6), per_channel=True),
    "windows-without-taps": Case(window=(2, 3), size=(4, 6), kernel=None),
    "one-token": Case(size=(1, 1)),
    # Fewer tokens than a head has channels:
    "small-7x7": Case(size=(7, 7), heads=2, head_dim=64),
    "small-6x6": Case(size=(6, 6), heads=2, head_dim=64),
    "small-5x2": Case(size=(5, 2), heads=2, head_dim=48),
    "small-windows": Case(window=(4, 4), size=(8, 12), shift=(1, 3), heads=3, head_dim=32),
    "small-cross": Case(kernel=None, keys=13, size=(4, 5), head_dim=40),
    "small-prefix": Case(prefix=2, size=(3, 5), head_dim=64),
    "one-head": Case(heads=1, head_dim=24),
    "head-dim-1": Case(heads=5, head_dim=1),
    "head-dim-8": Case(heads=4, head_dim=8),
    "head-dim-20": Case(heads=3, head_dim=20),
    "head-dim-32": Case(heads=3, head_dim=32, size=(10, 13)),
    "one-image": Case(heads=2, head_dim=32, size=(10, 13), batch=1),
    "head-dim-48": Case(heads=2, head_dim=48),
    "head-dim-64": Case(heads=2, head_dim=64, size=(8, 9)),
    "head-dim-96": Case(heads=1, head_dim=96),
    "head-dim-128": Case(heads=2, head_dim=128),
    "head-dim-256": Case(heads=1, head_dim=256, batch=1),
    "p1": Case(p=1.0),
    "p2": Case(p=2.0),
    "p4": Case(p=4.0),
    "p8": Case(p=8.0),
    "p2.5": Case(p=2.5),
    "large-map": Case(size=(40, 37), heads=3, head_dim=32, batch=1),
    "batch-1-many-blocks": Case(size=(64, 64), heads=1, head_dim=32, batch=1, key_bias=False),
}


@dataclass
class Call:
    """The tensors of a case on one device, each a leaf that asks for its gradient, and how to run it."""

    case: Case
    arguments: dict
    grad_out: Tensor

    @property
    def tensors(self) -> list[Tensor | None]:
        """In the order of TENSORS."""
        return [self.arguments.get(name) for name in TENSORS]

    def positional(self) -> list:
        """The arguments as the operator's schema orders them."""
        return positional(self.arguments, self.case.operator)

    def run(self, module=torch.ops.flatten) -> Tensor:
        return getattr(module, self.case.operator)(**self.arguments)

    def gradients(self, module=torch.ops.flatten) -> dict[str, Tensor]:
        present = {name: t for name, t in zip(TENSORS, self.tensors, strict=True) if t is not None}
        found = torch.autograd.grad(self.run(module), list(present.values()), self.grad_out)
        return dict(zip(present, found, strict=True))

    def oracle(self) -> Call:
        """The same call in float64 on the CPU."""
        return Call(self.case, with_gradients(_on_cpu(widened(self.arguments))), self.grad_out.cpu().double())


def make(case: Case, device: str = "cuda", seed: int = 0, requires_grad: bool = True) -> Call:
    """Random tensors for a case."""
    arguments = case.arguments(device=device, seed=seed)
    for name in TENSORS:
        if name in arguments:
            arguments[name] = arguments[name].detach().requires_grad_(requires_grad)
    rng = torch.Generator().manual_seed(seed + 1)
    grad_out = torch.randn(arguments["q"].shape, generator=rng, dtype=torch.float64)
    return Call(case, arguments, grad_out.to(case.dtype).to(device))


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Computes with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def widened(arguments: dict) -> dict:
    """The same call in float64."""
    return {k: a.double() if isinstance(a, Tensor) else a for k, a in arguments.items()}


def positional(arguments: dict, operator: str = "attention") -> list:
    """The arguments of an operator as its schema orders them."""
    schema = getattr(torch.ops.flatten, operator).default._schema
    return [arguments.get(a.name, a.default_value) for a in schema.arguments if not a.kwarg_only]


def with_gradients(arguments: dict, names=TENSORS) -> dict:
    return {
        k: a.detach().clone().requires_grad_() if isinstance(a, Tensor) and k in names else a
        for k, a in arguments.items()
    }


def gradients(function, arguments: dict, grad_out: Tensor) -> dict[str, Tensor]:
    """The output and the gradient of every tensor argument."""
    arguments = with_gradients(arguments)
    out = function(**arguments)
    tensors = {k: a for k, a in arguments.items() if isinstance(a, Tensor)}
    found = torch.autograd.grad(out, list(tensors.values()), grad_out.to(out.dtype).to(out.device))
    return {"out": out.detach(), **dict(zip(tensors, found, strict=True))}


def oracle(arguments: dict) -> Tensor:
    """The formula in float64 on the CPU."""
    return reference.attention(
        **{k: a.cpu() if isinstance(a, Tensor) else a for k, a in widened(arguments).items()}
    )


def oracle_gradients(arguments: dict, grad_out: Tensor) -> dict[str, Tensor]:
    return gradients(reference.attention, _on_cpu(widened(arguments)), grad_out.double().cpu())


def _on_cpu(arguments: dict) -> dict:
    return {k: a.cpu() if isinstance(a, Tensor) else a for k, a in arguments.items()}


def relative_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """|found - expected| / |expected| in the Frobenius norm, or over `floor` where |expected| is less."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    norm = torch.linalg.vector_norm(expected).clamp_min(max(floor, 1e-300))
    return (torch.linalg.vector_norm(found - expected) / norm).item()


def worst_error(found: Tensor, expected: Tensor) -> float:
    """The largest error, over the largest entry: one wrong row does not drown in the norm."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if not expected.numel():
        return 0.0
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300)).item()


def assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str, floor: float = 0.0) -> None:
    """A tensor within `tolerance` as a whole and within ten times that in every entry. One that cancels to
    almost nothing is measured by `floor`, a norm, instead of its own."""
    assert found.shape == expected.shape, what
    assert torch.isfinite(found).all(), f"{what} is not finite"
    error = relative_error(found, expected, floor)
    assert error <= tolerance, f"{what}: relative error {error:.1e}, allowed {tolerance:.1e}"
    if not floor:
        worst = worst_error(found, expected)
        assert worst <= 10 * tolerance, f"{what}: largest error {worst:.1e} of the largest entry"


def assert_all_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: Tolerance, floor: float = 0.0
) -> None:
    """What `gradients` gives, within the tolerance; `floor` is a part of the largest gradient's norm."""
    largest = max(torch.linalg.vector_norm(value).item() for value in expected.values())
    for name, value in expected.items():
        bound = tolerance.out if name == "out" else tolerance.gradient
        assert_close(found[name], value, bound, name, floor * largest)
