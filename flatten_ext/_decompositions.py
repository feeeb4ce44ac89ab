"""The operators as torch.export may decompose them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import _load as _load  # registers torch.ops.flatten
from . import reference

__all__ = ["decompositions"]


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """The operators in torch's own, for whatever takes an exported program and does not know ours.

    Example::

        program = torch.export.export(model, (x,))
        program = program.run_decompositions(
            {**torch.export.default_decompositions(), **flatten_ext.decompositions()}
        )
        openvino.convert_model(program)

    Returns:
        From `torch.ops.flatten`'s operators to their formulas in plain torch (`flatten_ext.reference`). ONNX
        has a table of its own, with fewer nodes: `flatten_ext.onnx`.
    """
    ops = torch.ops.flatten
    return {
        ops.attention.default: reference.attention,
        ops.linear_attention.default: reference.linear_attention,
        ops.depthwise_conv.default: reference.depthwise_conv,
        ops.attention_state.default: reference.attention_state,
        ops.attention_from_state.default: reference.attention_from_state,
    }
