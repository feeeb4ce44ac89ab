"""What the tests of the general form run: the reference, and the operators once they take its arguments."""

from __future__ import annotations

import pytest
import torch

import flatten_ext as flatten_ext  # registers torch.ops.flatten
from flatten_ext import reference


def _operators_take(argument: str) -> bool:
    schema = torch.ops.flatten.linear_attention.default._schema
    return any(a.name == argument for a in schema.arguments)


IMPLEMENTATIONS = [pytest.param(reference, id="reference")]
if _operators_take("key_weight"):
    IMPLEMENTATIONS.append(pytest.param(torch.ops.flatten, id="operator"))

every_implementation = pytest.mark.parametrize("operators", IMPLEMENTATIONS)
