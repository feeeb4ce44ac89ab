"""Calls of the general form: options drawn at random or by name, tensors from a seed.

A case makes keyword arguments for any implementation and any dtype; `oracle.py` says what they give.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

NORMALIZERS = ("divide", "none", "subtract", "magnitude")
# Every tensor with a gradient.
TENSORS = (
    "q", "k", "v", "scale", "key_bias", "dwc_weight", "dwc_bias", "key_weight", "gate",
    "normalizer_q", "normalizer_k",
)  # fmt: skip


@dataclass(frozen=True)
class General:
    size: tuple[int, int] = (3, 4)
    heads: int = 2
    head_dim: int = 4
    value_dim: int | None = None  # D_v; of linear_attention alone
    batch: int = 2
    prefix: int = 0
    keys: int | None = None  # other than the queries
    window: tuple[int, int] | None = None
    shift: tuple[int, int] | None = None
    kernel: tuple[int, int] | None = None
    taps: str = "head"  # whose they are: "head" (shared by heads), "channel", "image"
    bias: bool = True
    feature_map: str | None = "none"  # None: linear_attention
    scale: bool = False
    key_bias: bool = False
    p: float = 3.0
    eps: float = 1e-6
    rotary: str | None = None  # angles of "heads", shared by them, or of all "channels"
    key_weight: str | None = None  # of "keys" or of "heads"
    normalizer: str = "divide"
    similarity_scale: float = 1.0
    gate: str | None = None  # its activation
    normalizer_q: bool = False
    normalizer_k: bool = False

    @property
    def operator(self) -> str:
        return "linear_attention" if self.feature_map is None else "attention"

    def arguments(self, dtype=torch.float64, seed=0, param_dtype=None) -> dict:
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape, dtype=dtype):
            return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

        def feature(*shape):  # of one sign where something is divided by sums of products
            x = normal(*shape)
            signed = self.feature_map in ("focused", "elu", "relu") or self.normalizer in ("none", "subtract")
            return x if signed else x.abs() + 0.1

        param_dtype = param_dtype or dtype
        n = self.prefix + self.size[0] * self.size[1]
        m = n if self.keys is None else self.keys
        c = self.heads * self.head_dim
        width = self.value_dim or self.head_dim
        of_window = n if self.window is None else self.window[0] * self.window[1]
        arguments: dict = {
            "q": feature(self.batch, n, c),
            "k": feature(self.batch, m, c),
            "v": normal(self.batch, m, self.heads * width),
            "num_heads": self.heads,
            "eps": self.eps,
        }
        if self.feature_map is not None:
            arguments |= {"feature_map": self.feature_map, "focusing_factor": self.p}
        if self.scale:
            arguments["scale"] = normal(c, dtype=param_dtype).abs() + 0.5
        if self.key_bias:
            arguments["key_bias"] = 0.3 * normal(
                m if self.window is None else of_window, c, dtype=param_dtype
            )
        if self.kernel is not None:
            filters = {
                "head": (width,),
                "channel": (self.heads * width,),
                "image": (self.batch, self.heads * width),
            }
            shape = filters[self.taps]
            arguments["dwc_weight"] = 0.2 * normal(*shape, 1, *self.kernel, dtype=param_dtype)
            if self.bias and self.taps != "image":
                arguments["dwc_bias"] = normal(*shape, dtype=param_dtype)
        if self.kernel is not None or self.window is not None:
            arguments["size"] = list(self.size)
        if self.window is not None:
            arguments["window"] = list(self.window)
        if self.shift is not None:
            arguments["shift"] = list(self.shift)
        if self.rotary is not None:
            pairs = self.head_dim // 2 if self.rotary == "heads" else c // 2
            angle = 2 * normal(of_window, pairs, dtype=torch.float64)
            table = torch.stack((angle.cos(), angle.sin()), -1)
            arguments["rotary"] = table if dtype == torch.float64 else table.float()
        if self.key_weight is not None:
            heads = (self.heads,) if self.key_weight == "heads" else ()
            weight = normal(self.batch, m, *heads, dtype=torch.float64).abs() + 0.1
            arguments["key_weight"] = weight if dtype == torch.float64 else weight.float()
        arguments |= {"normalizer": self.normalizer, "similarity_scale": self.similarity_scale}
        if self.gate is not None:
            arguments["gate"] = normal(self.batch, n, self.heads * width)
            arguments["gate_activation"] = self.gate
        if self.normalizer_q:
            arguments["normalizer_q"] = feature(self.batch, n, c)
        if self.normalizer_k:
            arguments["normalizer_k"] = feature(self.batch, m, c)
        return arguments


def drawn(seed: int) -> General:
    """Any combination that the contract allows."""
    r = random.Random(seed)
    linear = r.random() < 0.4
    windowed = r.random() < 0.4
    window = r.choice([(2, 2), (1, 3), (3, 2)]) if windowed else None
    size = (
        (window[0] * r.choice([1, 2]), window[1] * r.choice([1, 2]))
        if window
        else r.choice([(3, 4), (1, 5), (4, 2)])
    )
    kernel = r.choice([None, (3, 3), (1, 5), (5, 1)])
    cross = window is None and kernel is None and r.random() < 0.4
    rotary = None if cross else r.choice([None, "heads", "channels"])
    feature_map = None if linear else r.choice(["focused", "elu", "relu", "none"])
    focused = feature_map == "focused"
    return General(
        size=size,
        heads=r.choice([1, 2, 3]),
        head_dim=r.choice([2, 4, 6] if rotary else [1, 3, 4]),
        value_dim=r.choice([None, 1, 3, 5]) if linear else None,
        batch=r.choice([1, 2]),
        prefix=r.choice([0, 0, 2]) if window is None else 0,
        keys=r.choice([2, 7, 13]) if cross else None,
        window=window,
        shift=(r.randrange(window[0]), r.randrange(window[1])) if window and r.random() < 0.5 else None,
        kernel=kernel,
        taps=r.choice(["head", "channel", "image"]),
        bias=r.random() < 0.5,
        feature_map=feature_map,
        scale=focused and r.random() < 0.5,
        key_bias=not linear and feature_map != "none" and r.random() < 0.5,
        p=r.choice([1.0, 2.0, 2.5, 3.0]) if focused else 3.0,
        eps=r.choice([1e-6, 1e-2]),
        rotary=rotary,
        key_weight=r.choice([None, "keys", "heads"]),
        normalizer=r.choice(NORMALIZERS),
        similarity_scale=r.choice([1.0, 0.3]),
        gate=r.choice([None, "none", "silu", "sigmoid"]),
        normalizer_q=linear and r.random() < 0.4,
        normalizer_k=linear and r.random() < 0.4,
    )


# A few by name, each of which makes something new meet something old.
NAMED = {
    "mlla": General(
        size=(4, 4), feature_map="elu", rotary="channels", kernel=(3, 3), taps="channel", gate="silu",
    ),
    "rala": General(
        size=(3, 5), feature_map="elu", rotary="heads", kernel=(5, 5), taps="channel", key_weight="heads",
        gate="none",
    ),
    "mala": General(
        size=(3, 5), feature_map="elu", rotary="heads", kernel=(5, 5), taps="channel", normalizer="magnitude",
        similarity_scale=0.5, gate="none",
    ),
    "inline": General(
        prefix=1, kernel=(3, 3), taps="image", normalizer="subtract", similarity_scale=0.5,
    ),
    "polaformer": General(feature_map=None, head_dim=8, value_dim=3, kernel=(3, 3), gate="none"),
    "sana-video": General(feature_map="relu", rotary="heads", eps=1e-9),
    "masked-windows": General(
        size=(4, 6), window=(2, 3), shift=(1, 2), feature_map="focused", scale=True, key_bias=True,
        kernel=(3, 3), key_weight="keys", rotary="heads", gate="sigmoid",
    ),
    "image-taps-in-windows": General(
        size=(4, 6), window=(2, 3), shift=(0, 1), feature_map="elu", kernel=(3, 3), taps="image",
    ),
    "cross": General(keys=5, feature_map="focused", key_weight="heads", normalizer="subtract", gate="silu"),
    "apart": General(
        feature_map=None, normalizer_q=True, normalizer_k=True, rotary="heads", value_dim=3,
        key_weight="keys", normalizer="magnitude",
    ),
}  # fmt: skip


def leaves(arguments: dict) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if name in TENSORS and x is not None}


def results(function, arguments: dict, grad_out: Tensor | None = None) -> dict[str, Tensor]:
    """The output, and the gradients of all tensors that have one (0 where no normalizer reads them)."""
    tensors = {name: x.detach().clone().requires_grad_() for name, x in leaves(arguments).items()}
    out = function(**(arguments | tensors))
    grad_out = torch.ones_like(out) if grad_out is None else grad_out.to(out.dtype)
    gradients = torch.autograd.grad(out, list(tensors.values()), grad_out, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(tensors, gradients, strict=True))}


def upstream(arguments: dict, seed: int = 1) -> Tensor:
    """A gradient of the output."""
    q, v = arguments["q"], arguments["v"]
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*q.shape[:2], v.shape[-1], generator=rng, dtype=torch.float64)


__all__ = [
    "NAMED", "NORMALIZERS", "TENSORS", "General", "drawn", "leaves", "results", "upstream",
]  # fmt: skip
