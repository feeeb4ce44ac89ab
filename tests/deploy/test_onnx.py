"""ONNX files against torch, run by onnxruntime; and the operators decomposed into torch's own."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from families import SMALL, small
from timm.utils.onnx import onnx_export
from torch import Tensor, nn

import flatten_ext.onnx
from flatten_ext import FocusedLinearAttention, attention, depthwise_conv, linear_attention

# What is dynamic in a family's file, and the other sizes (batch, height, width) at which it is run.
FAMILIES = {
    "deit": ("image", ((1, 224, 160), (3, 96, 320), (1, 150, 101))),
    "pvt_v2": ("image", ((1, 224, 160), (3, 96, 320), (1, 150, 101))),
    "swin": ("batch", ((1, 96, 160), (3, 96, 160), (5, 96, 160))),
    "pvt": ("batch", ((1, 96, 160), (3, 96, 160), (5, 96, 160))),
    "cswin": ("batch", ((1, 96, 160), (3, 96, 160), (5, 96, 160))),
}


class Call(nn.Module):
    """One call of an operator, as a model."""

    def __init__(self, operator, *args, **kwargs):
        super().__init__()
        self.operator, self.args, self.kwargs = operator, args, kwargs

    def forward(self, *tokens: Tensor) -> Tensor:
        return self.operator(*tokens, *self.args, **self.kwargs)


def run(path: Path, *inputs: Tensor) -> Tensor:
    """The first output of an ONNX file."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """To `tolerance` of the largest, which for logits of order 0.1 to 1 is stricter than 1e-4 absolute."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
    # torch takes long over PVT, whose attention is PVTv2's.
    "family",
    [pytest.param(f, marks=pytest.mark.packaging) if f == "pvt" else f for f in SMALL],
)
def test_families(family: str, tmp_path: Path) -> None:
    dynamic, shapes = FAMILIES[family]
    model = small(family).eval()
    flatten_ext.onnx.export(model, torch.randn(2, 3, 96, 160), tmp_path / "model.onnx", dynamic=dynamic)
    for batch, height, width in ((2, 96, 160), *shapes):
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            assert_close(run(tmp_path / "model.onnx", x), model(x))
    assert {node.domain for node in onnx.load(tmp_path / "model.onnx").graph.node} == {""}


# Operator, shapes of its parameters, options.
TAPS = {"dwc_weight": (8, 1, 3, 3), "dwc_bias": (8,)}
CASES = {
    "plain": (attention, {"keys": 50}, {}),
    "whole map": (attention, {"scale": (24,), "key_bias": (96, 24), **TAPS}, {"size": (12, 8)}),
    "prefix": (attention, {**TAPS}, {"size": (12, 7), "focusing_factor": 4.0}),
    "windows": (attention, {"key_bias": (24, 24), **TAPS}, {"size": (12, 8), "window": (6, 4)}),
    "shifted": (
        attention,
        {"scale": (24,), "key_bias": (24, 24), **TAPS},
        {"size": (12, 8), "window": (6, 4), "shift": (3, 1)},
    ),
    "p = 1": (attention, {}, {"focusing_factor": 1.0, "eps": 1e-3}),
    "features": (linear_attention, {**TAPS}, {"size": (12, 8), "window": (6, 4), "shift": (0, 3)}),
}


def call_of(case: str) -> tuple[Call, tuple[Tensor, ...]]:
    operator, shapes, options = CASES[case]
    keys = shapes.get("keys", 96)
    parameters = {name: torch.randn(shape) for name, shape in shapes.items() if name != "keys"}
    if "scale" in parameters:
        parameters["scale"] = parameters["scale"].abs() + 0.5
    q, k, v = torch.randn(2, 96, 24), torch.randn(2, keys, 24), torch.randn(2, keys, 24)
    if operator is linear_attention:
        q, k = q.exp(), k.exp()
    else:
        q[0, 3], k[1, 5] = -1, -1  # rows that are nothing but eps after the ReLU
    return Call(operator, 3, **parameters, **options).eval(), (q, k, v)


@pytest.mark.parametrize("case", CASES)
def test_operators(case: str, tmp_path: Path) -> None:
    model, tokens = call_of(case)
    flatten_ext.onnx.export(model, tokens, tmp_path / "call.onnx")
    assert_close(run(tmp_path / "call.onnx", *tokens), model(*tokens), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Half precision is computed in float32, so large tokens do not overflow. (onnxruntime has no
    convolution in float64.)"""
    options = {"size": (12, 8), "dwc_weight": torch.randn(8, 1, 5, 5)} if dtype == torch.float16 else {}
    model = Call(attention, 3, key_bias=torch.randn(96, 24).to(dtype), **options).eval()
    tokens = tuple((100 * torch.randn(2, 96, 24)).to(dtype) for _ in range(3))
    flatten_ext.onnx.export(model, tokens, tmp_path / "call.onnx")
    assert_close(
        run(tmp_path / "call.onnx", *tokens), model(*tokens), 1e-3 if dtype == torch.float16 else 1e-12
    )


def test_depthwise_conv(tmp_path: Path) -> None:
    model = Call(depthwise_conv, torch.randn(12, 1, 3, 5), None, (12, 7)).eval()  # 12 prefix tokens
    x = torch.randn(2, 96, 24)
    flatten_ext.onnx.export(model, x, tmp_path / "conv.onnx")
    assert_close(run(tmp_path / "conv.onnx", x), model(x), 1e-5)


class OnMaps(nn.Module):
    """Windows or prefix tokens on maps (B, H, W, C) of any size."""

    def __init__(self, prefix: int, **options):
        super().__init__()
        self.prefix, self.options = prefix, options
        self.dwc_weight = nn.Parameter(torch.randn(8, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat((x.new_ones(x.shape[0], self.prefix, 24), x.flatten(1, 2)), 1)
        size = x.shape[1:3]
        return attention(tokens, -tokens, tokens, 3, dwc_weight=self.dwc_weight, size=size, **self.options)


@pytest.mark.parametrize("prefix", [0, 2])
def test_dynamic_maps(prefix: int, tmp_path: Path) -> None:
    """Windows, their shift and the prefix are found by the graph at every size."""
    options = {} if prefix else {"window": (6, 4), "shift": (3, 1), "key_bias": torch.randn(24, 24)}
    model = OnMaps(prefix, **options).eval()
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    sizes = {0: batch, 1: height, 2: width} if prefix else {0: batch, 1: 6 * height, 2: 4 * width}
    flatten_ext.onnx.export(model, torch.randn(2, 12, 8, 24), tmp_path / "maps.onnx", dynamic=(sizes,))
    for shape in ((2, 12, 8, 24), (3, 24, 16, 24), (1, 6, 12, 24)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert_close(run(tmp_path / "maps.onnx", x), model(x), 1e-5)


def test_module_and_its_nodes(tmp_path: Path) -> None:
    """FocusedLinearAttention; and an attention takes few nodes (docs/deploy.md names the numbers)."""
    model = FocusedLinearAttention(24, 3, positional_encoding=(12, 8), num_prefix_tokens=1).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)

    class OnMap(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = model

        def forward(self, x):
            return self.attention(x, size=(12, 8))

    x = torch.randn(2, 97, 24)
    flatten_ext.onnx.export(OnMap().eval(), x, tmp_path / "module.onnx", dynamic="batch")
    for batch in (1, 2, 5):
        x = torch.randn(batch, 97, 24)
        with torch.no_grad():
            assert_close(run(tmp_path / "module.onnx", x), model(x, size=(12, 8)), 1e-5)
    for case, nodes in {"plain": 39, "whole map": 48, "shifted": 56}.items():
        assert count_nodes(*call_of(case), tmp_path) <= nodes, case


def count_nodes(model: nn.Module, tokens: tuple[Tensor, ...], folder: Path) -> int:
    flatten_ext.onnx.export(model, tokens, folder / "count.onnx")
    return len(onnx.load(folder / "count.onnx").graph.node)


def test_exporters_of_others(tmp_path: Path) -> None:
    """timm's exporter has no argument for a translation table, so it finds a registered one; it checks the
    file and its output itself. torch's takes the table."""
    flatten_ext.onnx.register()
    flatten_ext.onnx.register()
    path = str(tmp_path / "timm.onnx")
    shape = {"batch_size": 2, "input_size": (3, 96, 96)}
    onnx_export(small("deit").eval(), path, **shape, use_dynamo=True, check=True, check_forward=True)

    model, tokens = call_of("plain")
    table = flatten_ext.onnx.translation_table()
    torch.onnx.export(model, tokens, path, dynamo=True, custom_translation_table=table, verbose=False)
    assert_close(run(tmp_path / "timm.onnx", *tokens), model(*tokens), 1e-5)


def test_decompositions() -> None:
    """No operator of ours is left, and the program computes the same."""
    model = small("deit").eval()
    x = torch.randn(2, 3, 96, 160)
    program = torch.export.export(model, (x,)).run_decompositions(
        {**torch.export.default_decompositions(), **flatten_ext.decompositions()}
    )
    namespaces = {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
    assert namespaces <= {"aten", "prim", "prims"}
    torch.testing.assert_close(program.module()(x), model(x))


def test_bad_calls_leave_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("what was here")
    x = torch.randn(2, 3, 96, 160)

    def refused(error: type[Exception], message: str, **changes) -> None:
        call = {"model": small("deit").eval(), "args": x, "path": path, **changes}
        with pytest.raises(error, match=message):
            flatten_ext.onnx.export(**call)

    refused(ValueError, "training mode", model=small("deit"))
    refused(ValueError, "dynamic is 'width', expected", dynamic="width")
    refused(ValueError, r"shapes \[\(1, 3, 96, 160\)\], expected a batch of 2", args=x[:1], dynamic="batch")
    refused(ValueError, r"expected one \(B, C, H, W\)", args=(x, x), dynamic="image")
    refused(ValueError, "SwinTransformerBlock", model=small("swin").eval(), dynamic="image")
    refused(ValueError, "opset_version is 17, expected 18", opset_version=17)
    depends_on_data = Call(lambda x: x.nonzero().tolist()[int(x.sum())]).eval()
    refused(RuntimeError, "data-dependent", model=depends_on_data)
    refused(ValueError, "model.onnx", path=path / "a file is no folder.onnx")
    assert path.read_text() == "what was here"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_missing_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'flatten-ext\[onnx\]'"):
        flatten_ext.onnx.export(nn.Identity().eval(), torch.ones(1), tmp_path / "x.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models("flatten_*"))
def test_published_models(name: str, tmp_path: Path) -> None:
    """Every model at its own size, of any batch."""
    model = timm.create_model(name).eval()
    size = model.default_cfg["input_size"]
    flatten_ext.onnx.export(model, torch.randn(2, *size), tmp_path / "model.onnx", dynamic="batch")
    for batch in (1, 2, 3):
        x = torch.randn(batch, *size)
        with torch.no_grad():
            assert_close(run(tmp_path / "model.onnx", x), model(x))


class General(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        options = {"feature_map": "elu", "rotary": "heads", "gate": "silu", "normalizer": "magnitude"}
        self.attention = FocusedLinearAttention(16, 4, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = flatten_ext.attention_state(x, x, 4, feature_map="relu")
        return self.attention(x, (4, 6)) + flatten_ext.attention_from_state(x, state, 4, feature_map="relu")


def test_the_general_form_is_written_as_its_formula(tmp_path) -> None:
    model, path = General().eval(), tmp_path / "general.onnx"
    flatten_ext.onnx.export(model, torch.randn(2, 24, 16), path, dynamic="batch")
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(5, 24, 16)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(x).detach(), rtol=1e-5, atol=1e-5)
