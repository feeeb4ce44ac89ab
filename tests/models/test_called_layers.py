"""A depthwise layer that more than its weights hang on is called, a plain one is read; both give the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import SMALL, small
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from flatten_ext import FocusedLinearAttention, _local
from flatten_ext.models import _cores
from flatten_ext.models._attention import FocusedAttention

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "map": ({}, {"size": (4, 6)}),
    "windows": ({"grid": (2, 3)}, {"size": (4, 6), "window": (2, 3)}),
    "shifted windows": ({"grid": (2, 3)}, {"size": (4, 6), "window": (2, 3), "shift": (1, 2)}),
    "prefix tokens": ({"num_prefix_tokens": 2}, {"size": (4, 6)}),
    "tall kernel": ({"kernel_size": (5, 3)}, {"size": (4, 6)}),
    "lepe": ({"lepe": True}, {"size": (4, 6)}),
    "lepe, stripes": ({"lepe": True, "grid": (4, 2)}, {"size": (4, 6), "window": (4, 2)}),
    "lepe, tall kernel": ({"lepe": True, "kernel_size": (1, 5)}, {"size": (4, 6)}),
    "lepe alone": ({"lepe": True, "kernel_size": None}, {"size": (4, 6)}),
    "reduced keys": ({"grid": (2, 3)}, {"size": (4, 6), "key_size": (2, 3)}),
}


def _attention(name: str) -> tuple[FocusedAttention, list[torch.Tensor], dict[str, Any]]:
    made, called = CASES[name]
    module = FocusedAttention(12, 3, **{"grid": (4, 6), **made}, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    tokens = module.num_prefix_tokens + 24
    keys = 6 if "key_size" in called else tokens
    qkv = [torch.randn(2, n, 12, dtype=torch.float64, requires_grad=True) for n in (tokens, keys, keys)]
    return module, qkv, called


def _gradients(module: nn.Module, out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad((out * weights).sum(), [*inputs, *module.parameters()]))


def _watch(layers: list[nn.Module]) -> list[tuple[torch.Size, torch.Size]]:
    """Shapes that the layers are given and give, as hooks see them."""
    seen: list[tuple[torch.Size, torch.Size]] = []
    for layer in layers:
        layer.register_forward_hook(lambda _, given, out: seen.append((given[0].shape, out.shape)))
    return seen


@pytest.mark.parametrize("name", CASES)
def test_a_called_layer_gives_what_a_read_one_gives(name: str) -> None:
    module, qkv, arguments = _attention(name)
    read = module.attend(*qkv, **arguments)
    expected = _gradients(module, read, qkv)
    layers = [layer for layer in (module.dwc, module.get_v) if layer is not None]
    for watched in [layers[:1], layers[1:], layers]:
        for layer in layers:
            layer._forward_hooks.clear()
        seen = _watch(watched)
        called = module.attend(*qkv, **arguments)
        torch.testing.assert_close(called, read, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(_gradients(module, called, qkv), expected, rtol=1e-11, atol=1e-11)
        height, width = arguments.get("window") or arguments["size"]
        maps = 2 * 24 // (height * width)
        shapes = [(maps * (12 // layer.in_channels), layer.in_channels, height, width) for layer in watched]
        assert seen == [(shape, shape) for shape in shapes], "once, with all maps"


@pytest.mark.parametrize("name", CASES)
def test_a_plain_layer_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_local, "call_layer", None)
    module, qkv, arguments = _attention(name)
    module.attend(*qkv, **arguments)


OTHER_CORES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "MILA": (lambda: _cores.MilaAttention(12, 3, dtype=torch.float64), "lepe"),
    "RALA": (lambda: _cores.RalaAttention(12, 3, dtype=torch.float64), "lepe"),
    "rotary softmax": (lambda: _cores.RotarySoftmaxAttention(12, 3, dtype=torch.float64), "lepe"),
    "InLine": (lambda: _cores.InlineAttention(12, 3, lepe=True, dtype=torch.float64), "get_v"),
    "PolaFormer": (lambda: _cores.PolarAttention(12, 3, None, dtype=torch.float64), "dwc"),
}


@pytest.mark.parametrize("core", OTHER_CORES)
def test_the_other_cores_call_what_is_no_plain_layer(core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that has no weight of its own, as quantised layers and adapters have none."""
    make, name = OTHER_CORES[core]
    module, (q, k, v, gate) = make(), torch.randn(4, 2, 24, 12, dtype=torch.float64)
    more = {"source": q} if module.reads_input else {"gate": gate}
    with monkeypatch.context() as patch:
        patch.setattr(_local, "call_layer", None)
        read = module.attend(q, k, v, (4, 6), **more)
    setattr(module, name, nn.Sequential(getattr(module, name)))
    seen = _watch([getattr(module, name)])
    torch.testing.assert_close(module.attend(q, k, v, (4, 6), **more), read, rtol=1e-12, atol=1e-12)
    assert len(seen) == 1


def _replace_forward(layer: nn.Conv2d) -> None:  # as accelerate does to offload a layer
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1  # type: ignore[method-assign]


class _Adapted(nn.Module):
    """As a library of adapters wraps a layer."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 1


class _Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def _settings(**changes: Any) -> Callable[[nn.Module], None]:
    def change(parent: Any) -> None:
        old = parent.dwc
        parent.dwc = nn.Conv2d(4, 4, 5, groups=4, dtype=torch.float64, **{"padding": 2, **changes})
        parent.dwc.weight = old.weight

    return change


CHANGES: dict[str, Callable[[Any], Any]] = {
    "forward hook": lambda m: m.dwc.register_forward_hook(lambda _, given, out: out + 1),
    "forward pre-hook": lambda m: m.dwc.register_forward_pre_hook(lambda _, given: (given[0] + 1,)),
    "backward hook": lambda m: m.dwc.register_full_backward_hook(lambda _, grads, __: (2 * grads[0],)),
    "pruning": lambda m: prune.l1_unstructured(m.dwc, "weight", 0.3),
    "spectral norm of old": lambda m: spectral_norm(m.dwc),
    "weight norm of old": lambda m: torch.nn.utils.weight_norm(m.dwc),
    "spectral norm": lambda m: parametrizations.spectral_norm(m.dwc),
    "parametrized bias": lambda m: parametrize.register_parametrization(m.dwc, "bias", _Double()),
    "replaced forward": lambda m: _replace_forward(m.dwc),
    "adapter": lambda m: setattr(m, "dwc", _Adapted(m.dwc)),
    "subclass": lambda m: setattr(m.dwc, "__class__", type("Conv", (nn.Conv2d,), {})),
    "dilation": _settings(dilation=2, padding=4),
    "reflection": _settings(padding_mode="reflect"),
    "dense": lambda m: setattr(m, "dwc", nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)),
    "identity": lambda m: setattr(m, "dwc", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_hangs_on_the_layer_happens(change: str) -> None:
    """Values and gradients of attention without the layer plus the layer on the map of each head."""
    module = FocusedLinearAttention(12, 3, positional_encoding=(4, 6), dtype=torch.float64).eval()
    bare = copy.deepcopy(module)
    bare.dwc = None
    CHANGES[change](module)
    x = torch.randn(2, 24, 12, dtype=torch.float64, requires_grad=True)

    v = bare.qkv(x)[..., 24:]
    maps = v.unflatten(-1, (3, 4)).permute(0, 2, 3, 1).reshape(6, 4, 4, 6)
    added = module.dwc(maps).reshape(2, 12, 24).transpose(1, 2)
    q, k, _ = bare.qkv(x).chunk(3, -1)
    expected = bare.proj(bare.attend(q, k, v, (4, 6)) + added)

    weights = torch.randn_like(expected)
    theirs = list(module.dwc.parameters())
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *bare.parameters(), *theirs])
    found = module(x, (4, 6))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ours = [p for name, p in module.named_parameters() if not name.startswith("dwc")]
    gradients = torch.autograd.grad((found * weights).sum(), [x, *ours, *theirs])
    torch.testing.assert_close(gradients, wanted, rtol=1e-11, atol=1e-11)


def test_pruned_layers_train() -> None:
    """The pruned weight is computed anew for each step."""
    module = FocusedLinearAttention(12, 3)
    prune.l1_unstructured(module.dwc, "weight", 0.3)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    before = module.dwc.weight_orig.clone()
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(2, 16, 12)).square().mean().backward()
        optimizer.step()
    kept = module.dwc.weight_mask.bool()
    assert (module.dwc.weight_orig != before)[kept].all()
    assert torch.equal(module.dwc.weight_orig[~kept], before[~kept])
    prune.remove(module.dwc, "weight")  # the layer is plain again
    x = torch.randn(2, 16, 12)
    read = module(x)
    assert _watch([module.dwc]) == []
    torch.testing.assert_close(module(x), read)


def _depthwise_layers(model: nn.Module) -> list[nn.Module]:
    attentions = [m for m in model.modules() if isinstance(m, FocusedAttention)]
    layers = [layer for m in attentions for layer in (m.dwc, m.get_v) if layer is not None]
    assert layers
    return layers


@pytest.mark.parametrize("family", SMALL)
def test_hooks_see_every_layer_of_a_model_once(family: str) -> None:
    model = small(family, img_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        read = model(x)
        layers = _depthwise_layers(model)
        seen = _watch(layers)
        torch.testing.assert_close(model(x), read, rtol=1e-5, atol=1e-5)
    assert len(seen) == len(layers)


@pytest.mark.parametrize("family", SMALL)
def test_attention_itself_is_called(family: str) -> None:
    """Sharding, offloading and profiling by attention hang on its call."""
    model = small(family, img_size=64).eval()
    attentions = [m for m in model.modules() if isinstance(m, FocusedAttention)]
    calls: list[nn.Module] = []
    for attention in attentions:
        attention.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert calls == attentions


def test_hooks_on_all_modules() -> None:
    module = FocusedLinearAttention(12, 3)
    x, seen = torch.randn(2, 16, 12), []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: seen.append(layer))
    try:
        called = module(x)
    finally:
        handle.remove()
    assert module.dwc in seen
    torch.testing.assert_close(called, module(x))


def test_counting_flops_calls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlopCounterMode hooks every module to keep its name; what it counts is what runs without it."""
    monkeypatch.setattr(_local, "call_layer", None)
    module = FocusedLinearAttention(12, 3)
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(2, 16, 12))
    assert torch.ops.aten.convolution not in counter.get_flop_counts()["Global"]


def test_tensor_subclasses_are_left_to_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = FocusedLinearAttention(12, 3)
    x = torch.randn(2, 16, 12)
    expected = module(x)
    weight = module.dwc.weight.detach()
    module.dwc.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    given: list[type] = []

    def convolve(self: nn.Conv2d, x: torch.Tensor, weight: Any, bias: torch.Tensor) -> torch.Tensor:
        given.append(type(weight))
        return nn.functional.conv2d(x, weight.a, bias, padding=2, groups=4)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", convolve)
    torch.testing.assert_close(module(x), expected)
    assert given == [TwoTensor]


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("how", ["compile", "export", "strict export"])
def test_compilers_ask_the_same(how: str, changed: bool) -> None:
    module = FocusedLinearAttention(12, 3, positional_encoding=(4, 4)).eval()
    if changed:
        module.dwc.register_forward_hook(lambda _, given, out: 2 * out)
    x = torch.randn(2, 16, 12)
    targets: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    if how == "compile":
        run: Any = torch.compile(module, fullgraph=True, backend=backend)
        out = run(x)
    else:
        program = torch.export.export(module, (x,), strict=how.startswith("strict"))
        targets = [node.target for node in program.graph.nodes]
        out = program.module()(x)
    torch.testing.assert_close(out, module(x))
    convolutions = [t for t in targets if "conv" in str(t)]
    assert len(convolutions) == changed, targets


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("family", SMALL)
def test_fully_sharded_layer_by_layer(family: str, one_process: Any) -> None:
    model = small(family, img_size=64)
    plain = copy.deepcopy(model).eval()
    model.eval()
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Conv2d | nn.Linear | nn.LayerNorm) or module is model:
            dist.fsdp.fully_shard(module, mesh=one_process)
    x = torch.randn(2, 3, 64, 64)
    expected, found = plain(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found_gradient = parameter.grad.full_tensor()
            torch.testing.assert_close(found_gradient, gradients[name], rtol=1e-3, atol=1e-5, msg=name)
