"""The operators' arguments stand in their schemas (csrc/schemas.cpp); who spells them again for people, for
type checkers or for C++ spells the same ones, in the same order and with the same defaults."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flatten_ext import analysis, distributed, ops, reference

HEADER = Path(__file__).resolve().parents[1] / "include" / "flatten" / "flatten.h"
NO_DEFAULT = inspect.Parameter.empty
Arguments = dict[str, tuple[Any, bool]]  # the default, and whether it is given by keyword alone


def of_schema(operator: str) -> Arguments:
    schema = getattr(torch.ops.flatten, operator).default._schema
    return {
        argument.name: (
            argument.default_value if argument.has_default_value() else NO_DEFAULT,
            argument.kwarg_only,
        )
        for argument in schema.arguments
    }


def of_function(function: Any) -> Arguments:
    return {
        name: (parameter.default, parameter.kind is inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def defaults(arguments: Arguments) -> dict[str, Any]:
    return {name: default for name, (default, _) in arguments.items()}


@pytest.mark.parametrize("operator", ops.__all__)
def test_the_functions_have_the_operators_arguments(operator: str) -> None:
    assert list(of_function(getattr(ops, operator)).items()) == list(of_schema(operator).items())


@pytest.mark.parametrize("operator", ops.__all__)
def test_the_references_have_the_operators_arguments(operator: str) -> None:
    """What the reference of attention hands on, it hands to that of linear_attention."""
    function, expected = getattr(reference, operator), of_schema(operator)
    given = of_function(function)
    if operator != "attention":
        assert list(given.items()) == list(expected.items())
        return
    handed_on = set(expected) - set(given)
    given |= {name: of_function(reference.linear_attention)[name] for name in handed_on}
    assert given == expected


def test_of_several_processes() -> None:
    given = of_function(distributed.attention)
    assert given.pop("group") == (None, True)
    assert defaults(given) == defaults(of_schema("attention"))
    positional = [name for name, (_, by_keyword) in given.items() if not by_keyword]
    assert positional == list(of_schema("attention"))[: len(positional)]


def test_of_the_attention_map() -> None:
    """It has the arguments that make the matrix, of both operators."""
    given, expected = defaults(of_function(analysis.attention_map)), defaults(of_schema("attention"))
    expected |= {name: None for name in ("normalizer_q", "normalizer_k", "value_dim")}
    for absent in ("v", "dwc_bias", "window", "shift", "gate", "gate_activation"):
        del expected[absent]
    assert given == expected


@pytest.mark.parametrize("operator", ops.__all__)
def test_the_header_hands_over_the_operators_arguments(operator: str) -> None:
    text = HEADER.read_text()
    call = re.search(rf'detail::call\("flatten::{operator}",([^;]*)\);', text)
    assert call is not None
    given = [name.strip() for name in call[1].split(",")]
    names = [re.sub(r"^conv\.", "dwc_", name).rpartition(".")[2] for name in given]
    assert names == list(of_schema(operator))
    for name, default in defaults(of_schema(operator)).items():
        if isinstance(default, (float, str)):
            spelled = f'"{default}"' if isinstance(default, str) else r"[\d.e-]+"
            (value,) = set(re.findall(rf"\b{name} = ({spelled})", text))
            assert value.strip('"') == default if isinstance(default, str) else float(value) == default
