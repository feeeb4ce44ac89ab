"""ONNX: files that any ONNX runtime runs, and how torch's exporter translates our operators.

`export` writes a model to a file. Whoever calls torch's exporter directly hands it `translation_table()`:

    torch.onnx.export(model, (x,), "model.onnx", dynamo=True,
                      custom_translation_table=flatten_ext.onnx.translation_table())

An operator becomes a few dozen standard ONNX nodes (no custom operator), which compute it by the formulas of
`flatten_ext.reference`, in float32 where the tokens are in half precision. The extra `flatten-ext[onnx]` has
what this needs.

`register` puts the table where torch's exporter finds it by itself, for programs that call it with no table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._decompositions import decompositions
from .extras import require
from .output import replacing

__all__ = ["export", "register", "translation_table"]

# What torch.export takes as dynamic_shapes, or one of the two names that `export` knows.
Dynamic = str | Mapping[str, Any] | Sequence[Any] | None


def translation_table() -> dict[Any, Callable]:
    """How torch's ONNX exporter translates the operators: its `custom_translation_table`.

    Returns:
        From each of torch.ops.flatten's `attention`, `linear_attention` and `depthwise_conv` to the function
        that writes its ONNX nodes (opset 18 and later).

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
    """
    for package in ("onnx", "onnxscript"):
        require(package, "onnx", "export to ONNX")
    from . import _onnx_nodes

    return _onnx_nodes.table()


def register() -> None:
    """Lets every torch.onnx.export(..., dynamo=True) of this process translate the operators.

    For programs that take no translation table, such as timm's onnx_export.py: call it before them. Calling
    it again changes nothing.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
    """
    table = translation_table()
    registration = require("onnxscript.function_libs.torch_lib.registration", "onnx", "export to ONNX")
    for operator, function in table.items():
        name = operator.name().removesuffix(".default")
        if name not in registration.default_registry:
            registration.torch_op(name, trace_only=True)(function)


def export(
    model: nn.Module,
    args: Tensor | Sequence[Any],
    path: str | Path,
    *,
    dynamic: Dynamic = None,
    opset_version: int | None = None,
) -> torch.onnx.ONNXProgram:
    """Writes `model` to an ONNX file, with the operators as standard nodes.

    Example::

        model = timm.create_model("flatten_swin_tiny").eval()
        flatten_ext.onnx.export(model, torch.randn(2, 3, 224, 224), "swin.onnx", dynamic="batch")

    Args:
        model: in evaluation mode, on any device. Its weights go into the file, which ONNX limits to 2 GiB.
        args: an example input, or the sequence of the positional ones. A dimension to be dynamic should be
            2 or more in it: torch.export takes a size of 1 for a constant.
        path: of the file. It appears whole or not at all; an earlier one stays until then.
        dynamic: which sizes may change between calls:

            - None: none; the graph is the smallest.
            - "batch": the first dimension of every tensor, which is one and the same batch.
            - "image": batch, height and width of images (B, C, H, W). For every family but Swin, whose
              shifted windows torch.export cannot take with sizes unknown.
            - what torch.export.export takes as `dynamic_shapes`, for anything else.
        opset_version: ONNX opset, 18 or later; None for the exporter's default.

    Returns:
        The program that was written, as torch.onnx.export returns it.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
        ValueError: `model` is in training mode; `dynamic` is none of the above, or does not suit `args`; the
            file cannot be written, which is tried before the work.
        torch.onnx.OnnxExporterError: torch cannot export the model; the message says where.
    """
    table = translation_table()
    if model.training:
        raise ValueError("model is in training mode: call model.eval() before it is exported")
    if opset_version is not None and opset_version < 18:
        raise ValueError(f"opset_version is {opset_version}, expected 18 or later")
    example = (args,) if isinstance(args, Tensor) else tuple(args)
    shapes = _dynamic_shapes(dynamic, example, model)
    with replacing(Path(path)) as temporary, torch.no_grad():
        # torch.export itself, not torch.onnx.export's several tries, so that an error is the model's own.
        program = torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
        if any(map(_is_general, program.graph.nodes)):  # that form has no nodes of its own, but its formula
            program = program.run_decompositions(decompositions())
        result = torch.onnx.export(
            program,
            dynamo=True,
            custom_translation_table=table,
            opset_version=opset_version,
            verbose=False,
        )
        assert result is not None  # None is what the old exporter returns
        result.save(temporary, external_data=False)
    return result


def _is_general(node: torch.fx.Node) -> bool:
    """Whether a call has what the table of nodes does not: arguments by keyword, states, values of other
    channels, taps of each image's own."""
    if node.op != "call_function" or node.target not in decompositions():
        return False
    if "state" in node.target.name() or node.kwargs:
        return True
    shapes = [a.meta["val"].shape for a in node.args if isinstance(a, torch.fx.Node) and "val" in a.meta]
    tokens = {shape[2] for shape in shapes if len(shape) == 3}
    return len(tokens) > 1 or any(len(shape) == 5 for shape in shapes)


def _dynamic_shapes(dynamic: Dynamic, example: tuple[Any, ...], model: nn.Module) -> Any:
    """`dynamic` as torch.export's dynamic_shapes."""
    if not isinstance(dynamic, str):
        return dynamic
    if dynamic not in ("batch", "image"):
        raise ValueError(
            f"dynamic is {dynamic!r}, expected None, 'batch', 'image' or torch.export's dynamic_shapes"
        )
    shapes = [tuple(x.shape) for x in example if isinstance(x, Tensor)]
    if dynamic == "batch":
        if not shapes or any(len(shape) == 0 or shape[0] < 2 for shape in shapes):
            raise ValueError(
                f"dynamic is 'batch' and args have shapes {shapes}, expected a batch of 2 or more"
            )
        batch = torch.export.Dim("batch")
        return tuple({0: batch} if isinstance(x, Tensor) else None for x in example)
    if len(example) != 1 or len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][0] < 2:
        raise ValueError(
            f"dynamic is 'image' and args have shapes {shapes}, expected one (B, C, H, W) with B of 2 or more"
        )
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    if "SwinTransformerBlock" in kinds:  # by its name: timm need not be installed
        raise ValueError(
            "dynamic is 'image', and model has shifted softmax windows (timm's SwinTransformerBlock), which "
            "torch.export takes at one size only: expected 'batch' or None, and a file for each size"
        )
    any_size = torch.export.Dim.DYNAMIC
    return ({0: any_size, 2: any_size, 3: any_size},)
