"""The operators on DTensors, on two processes: equal to one, and how much is exchanged."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import flatten_ext
from flatten_ext import (
    FocusedLinearAttention,
    attention,
    attention_from_state,
    attention_state,
    depthwise_conv,
    linear_attention,
)

HERE = Path(__file__).parent


def test_two_processes(tmp_path: Path) -> None:
    """Runs `main` in two processes that meet through a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "meeting")],
            env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert all(output.count("equal") == len(CASES) for output in outputs)


# Name: operator, shapes of its parameters, options.
TAPS = {"dwc_weight": (8, 1, 3, 3), "dwc_bias": (8,)}
WINDOWS = {"size": (8, 6), "window": (4, 3), "shift": (1, 2)}
OPERATORS = {
    "attention": (attention, {"scale": (32,), "key_bias": (48, 32), **TAPS}, {"size": (8, 6)}),
    "windows": (attention, {"key_bias": (12, 32), **TAPS}, WINDOWS),
    "linear": (linear_attention, {"dwc_weight": (32, 1, 3, 3), "dwc_bias": (32,)}, WINDOWS),
    "shared taps": (linear_attention, {**TAPS}, {"size": (8, 6)}),
    "conv": (depthwise_conv, {"weight": (8, 1, 3, 3), "bias": (8,)}, {"size": (8, 6)}),
}
# How tokens lie: by image (evenly or not), token, channel, whole; and mixed.
LIES = ("batch", "uneven batch", "tokens", "channels", "whole", "mixed")
CASES = list(itertools.product(OPERATORS, LIES))


def run_case(operator: str, lie: str, mesh) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    function, shapes, options = OPERATORS[operator]
    torch.manual_seed(0)
    batch = 3 if lie == "uneven batch" else 4
    count = 1 if function is depthwise_conv else 3
    tokens = [torch.rand(batch, 48, 32, dtype=torch.float64) + 0.1 for _ in range(count)]
    parameters = {name: torch.rand(shape, dtype=torch.float64) + 0.5 for name, shape in shapes.items()}
    placements = {"batch": 0, "uneven batch": 0, "tokens": 1, "channels": 2}
    placed = [Shard(placements[lie]) if lie in placements else Replicate()] * count
    if lie == "mixed":
        placed = [Replicate(), *[Shard(0)] * (count - 1)]

    def call(tokens, parameters, grad) -> tuple[Tensor, list[Tensor]]:
        inputs = [x.requires_grad_() for x in (*tokens, *parameters.values())]
        heads = () if function is depthwise_conv else (4,)
        out = function(*tokens, *heads, **parameters, **options)
        return out, list(torch.autograd.grad(out, inputs, grad))

    cotangent = torch.randn(batch, 48, 32, dtype=torch.float64)
    expected, gradients = call([x.clone() for x in tokens], parameters, cotangent)

    sharded = [distribute_tensor(x.detach(), mesh, [p]) for x, p in zip(tokens, placed, strict=True)]
    whole = {n: distribute_tensor(p.detach(), mesh, [Replicate()]) for n, p in parameters.items()}
    grad_placement = Shard(0) if "batch" in lie or (lie == "mixed" and count > 1) else placed[0]
    grad = distribute_tensor(cotangent, mesh, [grad_placement])
    with CommDebugMode() as exchanged:
        out, sharded_gradients = call(sharded, whole, grad)
    by_heads = lie == "channels" and function is not attention
    if "batch" in lie or lie == "whole" or by_heads:
        assert exchanged.get_total_counts() == 0, exchanged.get_comm_counts()
    assert isinstance(out, DTensor)
    kept = 0 if "batch" in lie or (lie == "mixed" and count > 1) else 2 if by_heads else None
    assert out.placements == (Replicate() if kept is None else Shard(kept),)
    torch.testing.assert_close(out.full_tensor(), expected, rtol=1e-12, atol=1e-12)
    for actual, wanted in zip(sharded_gradients, gradients, strict=True):
        torch.testing.assert_close(actual.full_tensor(), wanted, rtol=1e-12, atol=1e-12)

    # Without gradients it is one call of the operator itself.
    with torch.no_grad():
        heads = () if function is depthwise_conv else (4,)
        plain = function(*[x.detach() for x in sharded], *heads, **whole, **options)
    torch.testing.assert_close(plain.full_tensor(), expected, rtol=1e-12, atol=1e-12)
    print("equal:", operator, lie, flush=True)


def general_form(mesh, lie: str, per_head: bool) -> None:
    """All arguments of the general form, then its two halves through a state; by images and by heads."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    shard: Any = {"batch": Shard(0), "channels": Shard(2), "whole": Replicate()}[lie]
    q, k, v, gate = torch.randn(4, 4, 48, 32, dtype=torch.float64).unbind()
    weight = torch.rand(4, 48, *([4] if per_head else []), dtype=torch.float64)
    parameters = {
        "rotary": torch.randn(48, 4 if per_head else 16, 2, dtype=torch.float64),
        "key_bias": torch.randn(48, 32, dtype=torch.float64),
        "dwc_weight": torch.randn(*((4, 32) if per_head else (8,)), 1, 3, 3, dtype=torch.float64),
        "key_weight": weight,
    }
    options = {"feature_map": "elu", "normalizer": "magnitude", "gate_activation": "silu"}

    def call(q, k, v, gate, rotary, key_bias, dwc_weight, key_weight, grad):
        leaves = [x.requires_grad_() for x in (q, k, v, gate, key_bias, dwc_weight, key_weight)]
        of_keys = {"rotary": rotary, "key_weight": key_weight}
        out = attention(
            q, k, v, 4, key_bias=key_bias, dwc_weight=dwc_weight, size=(8, 6), gate=gate, **of_keys, **options
        )
        state = attention_state(k, v, 4, None, key_bias, feature_map="relu", **of_keys)
        out = out + attention_from_state(
            q, state, 4, feature_map="relu", rotary=rotary, normalizer="subtract"
        )
        return out, state, torch.autograd.grad(out, leaves, grad)

    cotangent = torch.randn(4, 48, 32, dtype=torch.float64)
    whole = (q, k, v, gate, *parameters.values())
    expected, state, gradients = call(*(x.clone() for x in whole), cotangent)
    placed = [
        distribute_tensor(x.detach(), mesh, [shard if i < 4 else Replicate()]) for i, x in enumerate(whole)
    ]
    out, sharded_state, found = call(*placed, distribute_tensor(cotangent, mesh, [shard]))
    assert out.placements == (shard,)
    assert sharded_state.placements == (Shard(1) if lie == "channels" else shard,)
    torch.testing.assert_close(out.full_tensor(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sharded_state.full_tensor(), state, rtol=1e-12, atol=1e-12)
    for actual, wanted in zip(found, gradients, strict=True):
        torch.testing.assert_close(actual.full_tensor(), wanted, rtol=1e-11, atol=1e-11)


def refusals(mesh) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    x = distribute_tensor(torch.rand(2, 48, 32), mesh, [Replicate()])
    with pytest.raises(RuntimeError, match=r"flatten.attention: scale is a torch.Tensor beside DTensors"):
        attention(x, x, x, 4, torch.ones(32))
    with pytest.raises(RuntimeError, match=r"flatten.attention: num_heads is 5"):
        attention(x, x, x, 5)


def mesh_of_two_dimensions() -> None:
    """Images over one dimension of the mesh, heads over the other (of one process here)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 1))
    torch.manual_seed(0)
    x = torch.rand(4, 48, 32, dtype=torch.float64)
    sharded = distribute_tensor(x, mesh, [Shard(0), Shard(2)])
    out = linear_attention(sharded, sharded, sharded, 4)
    assert out.placements == (Shard(0), Shard(2))
    torch.testing.assert_close(out.full_tensor(), linear_attention(x, x, x, 4))


def module_by_images(mesh) -> None:
    """FocusedLinearAttention with its parameters on every process and the images shared out."""
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    torch.manual_seed(0)
    module = FocusedLinearAttention(32, 4, positional_encoding=(8, 6), dtype=torch.float64)
    x = torch.randn(4, 48, 32, dtype=torch.float64)
    expected = module(x, (8, 6))
    gradients = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
    distribute_module(module, mesh)
    out = module(distribute_tensor(x, mesh, [Shard(0)]), (8, 6))
    torch.testing.assert_close(out.full_tensor(), expected)
    out.square().sum().backward()
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient, rtol=1e-10, atol=1e-10)


def tensor_parallel(mesh) -> None:
    """Plans that share the projections' weights out: one process's numbers, or refused in words."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    for options, others in (({"positional_encoding": (8, 6)}, {"size": (8, 6)}), ({"kernel_size": None}, {})):
        alone = FocusedLinearAttention(32, 4, dtype=torch.float64, **options)
        module, refused = copy.deepcopy(alone), copy.deepcopy(alone)
        inputs = [torch.randn(4, 48, 32, dtype=torch.float64, requires_grad=True) for _ in range(2)]

        def call(module, inputs=inputs, others=others):
            x, other = inputs
            return module(x, **others) if others else module(x, context=other)

        results = []
        for one in (alone, module):
            if one is module:
                columns = ColwiseParallel(output_layouts=Replicate())
                rows = RowwiseParallel(input_layouts=Replicate())
                parallelize_module(module, mesh, {"qkv": columns, "proj": rows})
                assert isinstance(module.qkv.weight, DTensor)
                assert module.qkv.weight.to_local().shape == (48, 32)
                assert module.proj.weight.to_local().shape == (32, 16)
            out = call(one)
            out.square().sum().backward()
            gradients = [x.grad for x in (*inputs[: 1 if others else 2], *one.parameters())]
            results.append([out, *(g.full_tensor() if isinstance(g, DTensor) else g for g in gradients)])
            for x in inputs:
                x.grad = None
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

        parallelize_module(refused, mesh, {"qkv": ColwiseParallel(), "proj": RowwiseParallel()})
        with pytest.raises(ValueError, match=r"qkv gives 48 channels, expected 96, .* give qkv Colwise"):
            call(refused)


def main(rank: int, meeting: str) -> None:
    # DTensor is imported after flatten_ext here, and the rules are there all the same.
    assert "torch.distributed.tensor" not in sys.modules
    assert flatten_ext.attention is attention
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    for operator, lie in CASES:
        run_case(operator, lie, mesh)
    for lie, per_head in itertools.product(("batch", "channels", "whole"), (True, False)):
        general_form(mesh, lie, per_head)
    refusals(mesh)
    mesh_of_two_dimensions()
    module_by_images(mesh)
    tensor_parallel(mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
