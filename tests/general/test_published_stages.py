"""Whole attention modules at the sizes of published models' stages: projections in torch around one call.

The inputs and parameters of tests/golden/big_* are made by a recipe; recorded are samples of the output and
of every gradient, and sums over all of it.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from golden_data import Golden, unit
from implementations import every_implementation
from published import CORES, Tensors, size_of
from torch import Tensor

from flatten_ext.rotary import rotary_table


def drawn(case: str, key: str, shape: tuple[int, ...], step: int = 256) -> Tensor:
    """The recipe's number for an entry of the state_dict, or for x and dy."""
    u, last = unit(f"{case}/{key}", shape), key.rpartition(".")[2]
    if key in ("x", "dy"):
        values, step = u, 64
    elif last == "positional_encoding":
        values = 0.1 * u
    elif last in ("scale", "power") or last.endswith("_bias"):
        values = 0.5 * u
    elif last == "bias":
        values = 0.05 * u
    elif last == "running_mean":
        values = 0.1 * u
    elif last == "running_var":
        values = 1 + 0.2 * u
    elif len(shape) == 1:
        values = 1 + 0.1 * u
    else:
        values = u / math.sqrt(math.prod(shape[1:]))
    return (values * step + 0.5).floor() / step


class Stage:
    """A recorded stage as the cores of `published` read a case: its settings, x and parameters."""

    def __init__(self, case: str):
        self.golden = Golden(case)
        self.meta = {"scales": [5]} | self.golden.meta
        keys, shapes = (self.golden.strings(f"sd.{name}") for name in ("keys", "shapes"))
        self.tensors: Tensors = {"in.x": drawn(case, "x", tuple(self.meta["xshape"])).requires_grad_()}
        for key, shape in zip(keys, (tuple(json.loads(shape)) for shape in shapes), strict=True):
            if not key.endswith(("num_batches_tracked", "rotations", "angle")):
                trained = not key.endswith(("running_mean", "running_var"))
                self.tensors[f"param.{key}"] = drawn(case, key, shape).requires_grad_(trained)

    def __getitem__(self, key: str) -> Tensor:
        if key == "param.rope.rotations":
            return rotary_table(size_of(self), self.meta["dim"], dtype=torch.float64).unflatten(
                0, size_of(self)
            )
        if key == "param.RoPE.angle":
            pairs = self.meta["dim"] // self.meta["heads"] // 4
            return (10000.0 ** -torch.linspace(0, 1, pairs, dtype=torch.float64)).repeat_interleave(2)
        return self.tensors[key]

    def parameters(self) -> Tensors:
        return {key: x for key, x in self.tensors.items() if key.startswith("param.") and x.requires_grad}


def layer(stage: Stage, name: str, x: Tensor) -> Tensor:
    weight, bias = stage[f"param.{name}.weight"], stage.tensors.get(f"param.{name}.bias")
    return F.conv2d(x, weight, bias) if weight.dim() == 4 else F.linear(x, weight, bias)


def mlla(operators, stage: Stage) -> Tensor:
    mids = {"mid.qk.out": layer(stage, "qk", stage["in.x"])}
    return CORES["MLLA"].call(operators, stage, stage.parameters() | mids)


def with_gate(method: str):
    def module(operators, stage: Stage) -> Tensor:
        mids = {"mid.m.qkvo.out": layer(stage, "m.qkvo", stage["in.x"])}
        return layer(stage, "m.proj", CORES[method].call(operators, stage, stage.parameters() | mids))

    return module


def inline(operators, stage: Stage) -> Tensor:
    x, heads = stage["in.x"], stage.meta["heads"]
    taps = x.mean(1)[..., None]
    for index, activation in ((0, F.gelu), (2, lambda t: t)):
        weight, bias = (stage[f"param.residual.{index}.{kind}"] for kind in ("weight", "bias"))
        taps = activation(F.conv1d(taps, weight, bias, groups=heads))
    mids = {"mid.qkv.out": layer(stage, "qkv", x), "mid.residual.out": taps}
    return layer(stage, "proj", CORES["InLine"].call(operators, stage, stage.parameters() | mids))


def pola(operators, stage: Stage) -> Tensor:
    mids = {"mid.qkvg.out": layer(stage, "qkvg", stage["in.x"])}
    return layer(stage, "proj", CORES["PolaFormer"].call(operators, stage, stage.parameters() | mids))


def evit(operators, stage: Stage) -> Tensor:
    mids = {"mid.qkv.conv.out": layer(stage, "qkv.conv", stage["in.x"])}
    out = layer(stage, "proj.conv", CORES["EfficientViT"].call(operators, stage, stage.parameters() | mids))
    mean, var, weight, bias = (
        stage[f"param.proj.norm.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(out, mean, var, weight, bias)


def agent(operators, stage: Stage) -> Tensor:
    mids = {"mid.qkv.out": layer(stage, "qkv", stage["in.x"])}
    return layer(stage, "proj", CORES["Agent"].call(operators, stage, stage.parameters() | mids))


STAGES = {
    "big_mlla_s1": mlla,
    "big_rala_s1_rect": with_gate("RALA"),
    "big_mala_b_s1": with_gate("MALA"),
    "big_inline_swin_s1": inline,
    "big_pola_swin_s2": pola,
    "big_evit_l_s4": evit,
    "big_agent_swin_s2": agent,
}


@every_implementation
@pytest.mark.parametrize("case", STAGES)
def test_module_at_a_stage(operators, case):
    stage = Stage(case)
    out = STAGES[case](operators, stage)
    leaves = {"grad.x": stage["in.x"]}
    leaves |= {key.replace("param.", "grad."): x for key, x in stage.parameters().items()}
    gradients = torch.autograd.grad(out, list(leaves.values()), drawn(case, "dy", tuple(out.shape)))
    found = {"out.y": out.detach(), **dict(zip(leaves, gradients, strict=True))}
    for key, value in found.items():
        sample = stage.golden[f"{key}.sample"]
        total, absolute, squares, least, most = stage.golden[f"{key}.stats"].tolist()
        largest = max(abs(least), abs(most))
        assert tuple(value.shape) == tuple(stage.golden[f"{key}.shape"].tolist())
        flat = value.flatten()
        assert (flat[:: int(stage.golden[f"{key}.stride"])] - sample).abs().max() <= 1e-10 * largest, key
        assert abs(float(flat.sum()) - total) <= 1e-10 * absolute, key
        assert abs(float(flat.square().sum()) - squares) <= 1e-10 * squares, key
        assert abs(float(flat.max()) - most) <= 1e-10 * largest
        assert abs(float(flat.min()) - least) <= 1e-10 * largest
