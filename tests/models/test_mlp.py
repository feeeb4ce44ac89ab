"""The MLPs work in tiles where that saves memory, and give what timm's give."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from families import SMALL, small
from timm.layers import Mlp
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch._dynamo.testing import EagerAndRecordGraphs

from flatten_ext.bench.timing import peak_memory
from flatten_ext.models import _mlp


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
    monkeypatch.setattr(_mlp, "_IMAGES_TILE", 1 << 10)
    model = small(family).eval()
    plain = _untiled(model)
    assert {type(m) for m in model.modules()} & set(_mlp._TILED.values())
    assert model.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(3, 3, 96, 64)
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, tuple(_mlp._TILED.values())):
            module.fc1.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x))
    in_tiles, mlps = len(calls), len([m for m in model.modules() if type(m) in _mlp._TILED.values()])
    assert in_tiles > mlps
    calls.clear()
    torch.testing.assert_close(model(x), plain(x))  # with gradients: whole
    assert len(calls) == mlps


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
    tile = _mlp._IMAGES_TILE if conv else _mlp._TOKENS_TILE * threads
    assert peak(made) <= 4 * tile + 3 * x.nbytes
    torch.testing.assert_close(made(x, *size), plain(x, *size))


@pytest.mark.parametrize("conv", [False, True])
def test_a_compiler_is_given_parts_of_known_sizes(conv: bool, monkeypatch) -> None:
    made = MlpWithDepthwiseConv(16, 64) if conv else Mlp(16, 64)
    plain = copy.deepcopy(made)
    _mlp.tile_mlps(torch.nn.Sequential(made).eval())
    x, size = torch.randn(8, 16 * 16, 16), ((16, 16),) if conv else ()
    hidden = x.shape[0] * x.shape[1] * 64 * 4

    def layers(kept: int, dynamic: bool) -> int:
        monkeypatch.setattr(_mlp, "_KEPT", kept)
        torch._dynamo.reset()
        recorded = EagerAndRecordGraphs()
        with torch.no_grad():
            out = torch.compile(made, fullgraph=True, dynamic=dynamic, backend=recorded)(x, *size)
            torch.testing.assert_close(out, plain(x, *size))
        (graph,) = recorded.graphs
        return sum(node.target is torch._C._nn.linear for node in graph.graph.nodes)

    assert layers(hidden, dynamic=False) == 2
    assert layers(hidden // 2, dynamic=False) == 4
    assert layers(hidden // 7, dynamic=False) == 16
    assert layers(hidden // 7, dynamic=True) == 2


def test_other_mlps_are_left_alone() -> None:
    model = timm.create_model("flatten_deit_tiny", depth=1, mlp_layer=timm.layers.GluMlp)
    assert type(model.blocks[0].mlp) is timm.layers.GluMlp
