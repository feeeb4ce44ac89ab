"""OpenVINO runs exported models once the operators are decomposed, as docs/deploy.md has it."""

from __future__ import annotations

import pytest
import torch
from building import install_beside
from families import SMALL, small
from torch import Tensor, nn

import flatten_ext
from flatten_ext import FocusedLinearAttention

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def openvino(tmp_path_factory: pytest.TempPathFactory) -> None:
    install_beside(tmp_path_factory.mktemp("openvino"), "openvino", "openvino-telemetry")


def decomposed(model: nn.Module, example: Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    assert any("flatten.attention" in str(node.target) for node in program.graph.nodes)
    return program.run_decompositions(
        {**torch.export.default_decompositions(), **flatten_ext.decompositions()}
    )


def compare(model: nn.Module, x: Tensor, dynamic: bool) -> None:
    """Within the rounding of each precision: of float32, and of the one that OpenVINO takes by itself, which
    is bfloat16 on a processor that multiplies it."""
    import openvino

    converted = openvino.convert_model(decomposed(model, x, dynamic))
    for options, tolerance in (({"INFERENCE_PRECISION_HINT": "f32"}, 1e-5), ({}, 3e-2)):
        compiled = openvino.compile_model(converted, "CPU", options)
        for inputs in (x, x[:1]) if dynamic else (x,):
            with torch.no_grad():
                expected = model(inputs)
            found = torch.from_numpy(compiled(inputs.numpy())[0])
            scale = float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("family", SMALL)
def test_families(family: str) -> None:
    # OpenVINO has no antialiased resampling, by which timm's DeiT takes other image sizes.
    options = {"dynamic_img_size": False, "img_size": 64} if family == "deit" else {}
    compare(small(family, **options).eval(), torch.randn(2, 3, 64, 64), dynamic=False)


def test_module_at_any_batch() -> None:
    module = FocusedLinearAttention(24, 3, positional_encoding=(8, 8)).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    compare(module, torch.randn(2, 64, 24), dynamic=True)
