"""Calls of the operators for the GPU tests, and the float64 oracle's answers to them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flatten_ext import reference

EMULATED = os.environ.get("CUDAEMU") == "1"
NAMES = ("q", "k", "v", "scale", "key_bias", "dwc_weight", "dwc_bias")

# Relative error (2-norm) of outputs and gradients against float64 on the same, already rounded, inputs.
TOLERANCE = {
    torch.float64: (1e-13, 1e-13),
    torch.float32: (1e-6, 3e-6),
    torch.float16: (1e-3, 2e-3),
    torch.bfloat16: (5e-3, 8e-3),
}


@dataclass(frozen=True)
class Case:
    """One call. `layout` says how q, k and v lie in memory."""

    batch: int = 2
    queries: int = 49
    keys: int | None = None  # as many as queries
    heads: int = 2
    head_dim: int = 32
    size: tuple[int, int] | None = None
    window: tuple[int, int] | None = None
    shift: tuple[int, int] | None = None
    kernel: tuple[int, int] | None = None
    per_channel: bool = False
    tap_size: float = 0.3  # 0: the convolution cannot hide errors of the attention
    bias: bool = True
    scale: bool = True
    key_bias: bool = False
    p: float | None = 3.0  # None: linear_attention
    eps: float = 1e-6
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype | None = None  # q's
    layout: str = "contiguous"
    amplitude: float = 1.0

    def __str__(self) -> str:
        default = Case()
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return " ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in changed.items()) or "default"


def on_map(height: int, width: int, prefix: int = 0, **kwargs) -> Case:
    """A case whose tokens tile a map."""
    return Case(size=(height, width), queries=height * width + prefix, **kwargs)


@dataclass
class Call:
    """The tensors of a case on one device, and how to run it."""

    case: Case
    tensors: list[Tensor | None]
    grad_out: Tensor
    options: tuple = field(init=False)

    def __post_init__(self):
        c = self.case
        self.options = (c.heads, c.size, c.window, c.shift, c.p, c.eps)

    def run(self, module=torch.ops.flatten) -> Tensor:
        q, k, v, scale, key_bias, weight, bias = self.tensors
        heads, size, window, shift, p, eps = self.options
        if p is None:
            return module.linear_attention(q, k, v, heads, weight, bias, size, window, shift, eps)
        return module.attention(q, k, v, heads, scale, key_bias, weight, bias, size, window, shift, p, eps)

    def gradients(self, module=torch.ops.flatten) -> dict[str, Tensor]:
        present = {n: t for n, t in zip(NAMES, self.tensors, strict=True) if t is not None}
        out = self.run(module)
        gradients = torch.autograd.grad(out, list(present.values()), self.grad_out)
        return dict(zip(present, gradients, strict=True))

    def oracle(self) -> Call:
        """The same call in float64 on the CPU."""
        tensors = [None if t is None else t.detach().cpu().double().requires_grad_() for t in self.tensors]
        return Call(self.case, tensors, self.grad_out.cpu().double())


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x, laid out as models lay them out."""
    if layout == "contiguous":
        return x
    batch, _, channels = x.shape
    if layout == "packed":  # q of a packed projection
        return torch.stack([x, x, x], 2).flatten(2)[..., channels : 2 * channels]
    if layout == "misaligned":  # channels start one element off every vector boundary
        return torch.cat([x[..., :1], x, x[..., :2]], -1)[..., 1 : channels + 1]
    if layout == "tokens first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return x[:1].expand(batch, -1, -1)
    if layout == "channels first":  # channels are not adjacent: copied once
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    raise ValueError(layout)


def make(case: Case, device: str = "cuda", seed: int = 0, requires_grad: bool = True) -> Call:
    """Random tensors for a case, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    channels = case.heads * case.head_dim
    keys = case.queries if case.keys is None else case.keys

    def normal(*sizes: int, size: float = 1.0) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64) * size

    def tokens(count: int) -> Tensor:
        x = normal(case.batch, count, channels, size=case.amplitude)
        return x.abs() if case.p is None else x  # features of linear_attention are positive

    scale = key_bias = weight = bias = None
    qkv = [tokens(case.queries), tokens(keys), tokens(keys)]
    if case.scale and case.p is not None:
        scale = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
    if case.key_bias:
        rows = keys if case.window is None else case.window[0] * case.window[1]
        key_bias = normal(rows, channels, size=0.5)
    if case.kernel:
        kernels = channels if case.per_channel else case.head_dim
        weight = normal(kernels, 1, *case.kernel, size=case.tap_size)
        bias = normal(kernels, size=case.tap_size) if case.bias else None
    parameter_dtype = case.parameter_dtype or case.dtype

    def place(t: Tensor | None, dtype: torch.dtype, layout: str = "contiguous") -> Tensor | None:
        return (
            None if t is None else lay_out(t.to(device, dtype), layout).detach().requires_grad_(requires_grad)
        )

    tensors = [place(t, case.dtype, case.layout) for t in qkv]
    tensors += [place(t, parameter_dtype) for t in (scale, key_bias, weight, bias)]
    grad_out = normal(case.batch, case.queries, channels).to(device, case.dtype)
    return Call(case, tensors, grad_out)


def relative_error(got: Tensor, want: Tensor) -> float:
    difference = got.detach().cpu().double() - want.detach()
    return (difference.norm() / want.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def worst_error(got: Tensor, want: Tensor) -> float:
    """The largest error, over the largest entry: one wrong row does not drown in the norm."""
    difference = got.detach().cpu().double() - want.detach()
    return (difference.abs().max() / want.abs().max().clamp_min(torch.finfo(torch.float64).tiny)).item()


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == want.shape, what
    assert torch.isfinite(got).all(), f"{what} is not finite"
    error, worst = relative_error(got, want), worst_error(got, want)
    assert error < tolerance, f"{what}: relative error {error:.1e}, allowed {tolerance:.0e}"
    assert worst < 10 * tolerance, f"{what}: largest error {worst:.1e} of the largest entry"


def check(case: Case, gradients: bool = True) -> None:
    """Outputs and gradients of a case against the oracle."""
    call = make(case)
    oracle = call.oracle()
    for_out, for_gradients = TOLERANCE[case.dtype]
    assert_close(call.run(), oracle.run(reference), for_out, "out")
    if not gradients:
        return
    if case.p is None:
        # With features that are all positive q's gradient is a difference of nearly equal terms.
        for_gradients *= 4
    want = oracle.gradients(reference)
    got = call.gradients()
    for name, gradient in got.items():
        assert gradient.dtype == call.tensors[NAMES.index(name)].dtype, name
        assert_close(gradient, want[name], for_gradients, f"gradient of {name}")


def half(case: Case, dtype: torch.dtype = torch.bfloat16) -> Case:
    """The case as mixed-precision training calls it: float32 parameters."""
    return replace(case, dtype=dtype, parameter_dtype=torch.float32)
