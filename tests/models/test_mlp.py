"""The MLPs work in tiles where that saves memory, and give what timm's give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from families import SMALL, small
from timm.layers import Mlp
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from flatten_ext.models import _mlp
from flatten_ext.tools.bench.timing import peak_memory


def _untiled(model: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        for plain, tiled in _mlp._TILED.items():
            if type(module) is tiled:
                module.__class__ = plain
    return model


@pytest.mark.parametrize("family", list(SMALL))
def test_tiles_change_nothing(family: str, monkeypatch) -> None:
    monkeypatch.setattr(_mlp, "_TOKENS_TILE", 1 << 10)
    monkeypatch.setattr(_mlp, "_LEAST_TOKENS", 1)
    monkeypatch.setattr(_mlp, "_IMAGES_TILE", 1 << 10)
    model = small(family).eval()
    plain = _untiled(model)
    assert {type(m) for m in model.modules()} & set(_mlp._TILED.values())
    assert model.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(3, 3, 96, 64)
    mlps = len([m for m in model.modules() if type(m) in _mlp._TILED.values()])
    with torch.inference_mode(), _Linears() as tiled:
        found = model(x)
    with torch.inference_mode(), _Linears() as whole:
        torch.testing.assert_close(found, plain(x))
    assert tiled.count > whole.count + mlps
    with torch.no_grad(), _Linears() as watched:  # by hooks, which see whole MLPs
        for module in model.modules():
            if isinstance(module, tuple(_mlp._TILED.values())):
                module.fc1.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model(x), found)
    assert watched.count == whole.count
    for module in model.modules():
        module._forward_hooks.clear()
    with _Linears() as recorded:  # with gradients: whole
        torch.testing.assert_close(model(x), plain(x))
    assert recorded.count == 2 * whole.count


class _Linears(TorchFunctionMode):
    """Counts the calls of linear layers."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.nn.functional.linear
        return func(*args, **(kwargs or {}))


LAYERS = {False: ("fc1", "act", "drop1", "norm", "fc2", "drop2"), True: ("fc1", "dwconv", "act", "fc2")}


@pytest.mark.parametrize(("conv", "layer"), [(c, layer) for c in LAYERS for layer in LAYERS[c]])
def test_hooks_see_the_batch_once(conv: bool, layer: str) -> None:
    mlp, arguments = _tiled(conv)
    with torch.no_grad():
        expected = mlp(*arguments)
        seen: list[tuple[int, ...]] = []
        handle = mlp.get_submodule(layer).register_forward_hook(lambda _, __, out: seen.append(out.shape))
        torch.testing.assert_close(mlp(*arguments), expected)
        channels = 16 if layer in ("fc2", "drop2") else 512
        assert seen == [(16, 512, 32, 32) if layer == "dwconv" else (16, 1024, channels)]
        handle.remove()
        seen.clear()
        with register_module_forward_hook(lambda module, _, out: seen.append(out.shape)):
            mlp(*arguments)
        assert len(seen) == len(list(mlp.children())) + conv + 1  # PVTv2's dropout runs twice


def test_a_flop_counter_counts_tiles() -> None:
    """Its hooks on all modules only keep names."""
    mlp, arguments = _tiled(conv=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _Linears() as linears:
        mlp(*arguments)
    assert linears.count > 2
    assert counter.get_total_flops() == 2 * 2 * 16 * 1024 * 16 * 512


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("conv", [False, True])
def test_quantised_weights_are_left_to_their_layers(conv: bool, compiled: bool) -> None:
    """As torchao's: tensor subclasses that know how to multiply, not how to be read."""
    mlp, arguments = _tiled(conv)
    with torch.no_grad():
        expected = mlp(*arguments)
        for layer in (mlp.fc1, mlp.fc2):
            weight = layer.weight.detach()
            layer.weight = torch.nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
        run = torch.compile(mlp, fullgraph=True, backend="aot_eager") if compiled else mlp
        out = run(*arguments)
    assert type(out) is TwoTensor
    torch.testing.assert_close(out.a, expected)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_convolution_reads_channels_last(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of one image too, whose batch axis has any stride."""
    mlp = MlpWithDepthwiseConv(16, 64, extra_relu=True)
    plain = copy.deepcopy(mlp)
    _mlp.tile_mlps(torch.nn.Sequential(mlp))
    given: list[torch.Tensor] = []
    mlp.dwconv.register_forward_pre_hook(lambda _, maps: given.extend(maps))
    x = torch.randn(batch, 6 * 5, 16)
    torch.testing.assert_close(mlp(x, (6, 5)), plain(x, (6, 5)))
    assert given[0].stride() == (64 * 30, 1, 64 * 5, 64)


@pytest.mark.parametrize("conv", [False, True])
def test_tiles_bound_the_hidden_activations(conv: bool) -> None:
    made = MlpWithDepthwiseConv(16, 512) if conv else Mlp(16, 512)
    holder = torch.nn.Sequential(made).eval()
    plain = copy.deepcopy(made)
    _mlp.tile_mlps(holder)
    x, size = torch.randn(16, 32 * 32, 16), ((32, 32),) if conv else ()

    def peak(mlp) -> int:
        def call():
            with torch.inference_mode():
                return mlp(x, *size)

        return peak_memory(call, torch.device("cpu"))

    hidden = x.shape[0] * x.shape[1] * 512 * 4
    assert peak(plain) >= 2 * hidden
    threads = torch.get_num_threads()
    tokens_tile = max(_mlp._TOKENS_TILE * threads, _mlp._LEAST_TOKENS * 512 * 4)
    tile = _mlp._IMAGES_TILE if conv else tokens_tile
    assert peak(made) <= 4 * tile + 3 * x.nbytes
    torch.testing.assert_close(made(x, *size), plain(x, *size))


def _tiled(conv: bool, **settings: bool) -> tuple[torch.nn.Module, tuple]:
    """An MLP worth tiling, and arguments for it."""
    torch.manual_seed(0)
    mlp = (MlpWithDepthwiseConv(16, 512, **settings) if conv else Mlp(16, 512, **settings)).eval()
    _mlp.tile_mlps(torch.nn.Sequential(mlp))
    return mlp, (torch.randn(16, 32 * 32, 16), *(((32, 32),) if conv else ()))


def _targets(mlp: torch.nn.Module, arguments: tuple, dynamic: bool = False) -> list:
    """What the nodes of the one graph of torch.compile call, once its result is checked."""
    torch._dynamo.reset()
    recorded = EagerAndRecordGraphs()
    with torch.no_grad():
        out = torch.compile(mlp, fullgraph=True, dynamic=dynamic, backend=recorded)(*arguments)
        torch.testing.assert_close(out, mlp(*arguments))
    (graph,) = recorded.graphs
    return [node.target for node in graph.graph.nodes]


OPERATOR = torch.ops.flatten.mlp_in_tiles.default


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("conv", [False, True])
def test_to_a_compiler_it_is_one_operator(conv: bool, dynamic: bool) -> None:
    mlp, arguments = _tiled(conv)
    targets = _targets(mlp, arguments, dynamic)
    assert targets.count(OPERATOR) == 1
    assert torch._C._nn.linear not in targets


@pytest.mark.parametrize("conv", [False, True])
def test_a_compiler_sees_what_is_small(conv: bool) -> None:
    mlp, (x, *size) = _tiled(conv)
    targets = _targets(mlp, (x[:1], *size))
    assert OPERATOR not in targets
    assert targets.count(torch._C._nn.linear) == 2


def test_a_compiler_sees_layers_that_do_more() -> None:
    """The operator would leave out what a hook or another class of layer adds."""
    mlp, arguments = _tiled(conv=False)
    mlp.fc2.register_forward_hook(lambda module, given, out: 2 * out)
    assert OPERATOR not in _targets(mlp, arguments)

    class Adapted(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    mlp, arguments = _tiled(conv=False)
    mlp.fc1.__class__ = Adapted
    assert OPERATOR not in _targets(mlp, arguments)

    mlp, arguments = _tiled(conv=False)
    mlp.drop1.train()  # dropout at inference; its probability of 0 keeps the result comparable
    assert OPERATOR not in _targets(mlp, arguments)


@pytest.mark.parametrize("conv", [False, True])
def test_the_operator_follows_autocast(conv: bool) -> None:
    mlp, arguments = _tiled(conv)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = mlp(*arguments)
        out = torch.compile(mlp, fullgraph=True, backend="aot_eager")(*arguments)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kind", ["tokens", "tanh", "images", "relu"])
def test_the_operator_by_torchs_own_checks(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(_mlp, "_TOKENS_TILE", 1)
    monkeypatch.setattr(_mlp, "_LEAST_TOKENS", 3)
    monkeypatch.setattr(_mlp, "_IMAGES_TILE", 1)
    conv = kind in ("images", "relu")
    mlp, _ = _tiled(conv, **({"extra_relu": True} if kind == "relu" else {}))
    weights = [mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias]
    weights += [mlp.dwconv.weight, mlp.dwconv.bias] if conv else [None, None]
    weights = [None if w is None else w.detach() for w in weights]
    x = torch.randn(5, 4 * 6, 16) if conv else torch.randn(10, 16)
    approximate = "tanh" if kind == "tanh" else "none"
    arguments = (x, *weights, kind == "relu", [4, 6] if conv else None, approximate)
    torch.library.opcheck(OPERATOR, arguments)
    mlp.act.approximate = approximate
    torch.testing.assert_close(OPERATOR(*arguments), mlp(x, (4, 6)) if conv else mlp(x))


def test_other_mlps_are_left_alone() -> None:
    model = timm.create_model("flatten_deit_tiny", depth=1, mlp_layer=timm.layers.GluMlp)
    assert type(model.blocks[0].mlp) is timm.layers.GluMlp
