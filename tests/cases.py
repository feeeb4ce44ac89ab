"""Calls to compare with the oracle: shapes and options by name, tensors from a seed, errors in one number."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flatten_ext import reference

# Relative Frobenius error allowed against float64 on the same rounded inputs; gradients may have twice that.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
DTYPES = list(TOLERANCE)
TENSORS = ("q", "k", "v", "scale", "key_bias", "dwc_weight", "dwc_bias")


@dataclass(frozen=True)
class Case:
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
    p: float = 3.0
    magnitude: float = 1.0

    def arguments(self, dtype=torch.float32, device="cpu", param_dtype=None, seed=0) -> dict:
        """Keyword arguments of torch.ops.flatten.attention."""
        rng = torch.Generator().manual_seed(seed)

        def random(*shape, dtype=dtype):
            return (torch.randn(*shape, generator=rng, dtype=torch.float64)).to(dtype).to(device)

        param_dtype = param_dtype or dtype
        n = self.prefix + self.size[0] * self.size[1]
        m = n if self.keys is None else self.keys
        c = self.heads * self.head_dim
        arguments: dict = {
            "q": random(self.batch, n, c) * self.magnitude,
            "k": random(self.batch, m, c) * self.magnitude,
            "v": random(self.batch, m, c),
            "num_heads": self.heads,
            "focusing_factor": self.p,
        }
        if self.scale:
            arguments["scale"] = random(c, dtype=param_dtype).abs() + 0.5
        if self.key_bias:
            rows = m if self.window is None else self.window[0] * self.window[1]
            arguments["key_bias"] = 0.3 * random(rows, c, dtype=param_dtype) * self.magnitude
        if self.kernel is not None:
            filters = c if self.per_channel else self.head_dim
            arguments["dwc_weight"] = 0.2 * random(filters, 1, *self.kernel, dtype=param_dtype)
            if self.bias:
                arguments["dwc_bias"] = random(filters, dtype=param_dtype)
        if self.kernel is not None or self.window is not None:
            arguments["size"] = list(self.size)
        if self.window is not None:
            arguments["window"] = list(self.window)
        if self.shift is not None:
            arguments["shift"] = list(self.shift)
        return arguments


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


def widened(arguments: dict) -> dict:
    """The same call in float64."""
    return {k: a.double() if isinstance(a, Tensor) else a for k, a in arguments.items()}


def positional(arguments: dict) -> list:
    """The arguments of attention as its schema orders them."""
    schema = torch.ops.flatten.attention.default._schema
    return [arguments.get(a.name, a.default_value) for a in schema.arguments]


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


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the Frobenius norm."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return (
        torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-300)
    ).item()


def linear_arguments(arguments: dict) -> dict:
    """The call of linear_attention with the same features: positive ones, without the focused mapping."""
    kept = {k: a for k, a in arguments.items() if k not in ("scale", "key_bias", "focusing_factor")}
    return {**kept, "q": kept["q"].abs() + 0.1, "k": kept["k"].abs() + 0.1}


__all__ = [
    "CASES", "DTYPES", "TENSORS", "TOLERANCE", "Case", "gradients", "linear_arguments", "oracle",
    "oracle_gradients", "relative_error", "replace", "widened", "with_gradients",
]  # fmt: skip
