"""Bad arguments: each gives the one clear error that names it, from every entry, and nothing is computed.

The tables are in bad_arguments.py; test_fuzz.py breaks several arguments at once.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.autograd.forward_ad as fwd
from bad_arguments import (
    CASES,
    OPERATORS,
    Case,
    attention_arguments,
    conv_arguments,
    inf,
    nan,
    randn,
    token_cases,
    with_entry,
)

import flatten_ext

ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError)
internal = torch.ops.flatten


def call(name: str, changes: dict, *, requires_grad: bool = False) -> torch.Tensor:
    function, make_arguments = OPERATORS[name]
    arguments = {**make_arguments(), **changes}
    if requires_grad:
        arguments = {
            n: v.detach().requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for n, v in arguments.items()
        }
    return function(**arguments)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("name", "changes", "message"), CASES, ids=[f"{c[0]}: {c[2]}" for c in CASES])
def test_message(name: str, changes: dict, message: str, requires_grad: bool) -> None:
    with pytest.raises(ERRORS, match=re.escape(f"flatten.{name}: {message}")):
        call(name, changes, requires_grad=requires_grad)


@pytest.mark.parametrize(("name", "changes", "message"), CASES, ids=[f"{c[0]}: {c[2]}" for c in CASES])
def test_message_by_other_ways(name: str, changes: dict, message: str) -> None:
    """Under autocast, in inference mode, and in forward mode, where the reference runs."""
    expected = pytest.raises(ERRORS, match=re.escape(f"flatten.{name}: {message}"))
    with torch.inference_mode(), expected:
        call(name, changes)
    arguments = {**OPERATORS[name][1](), **changes}
    if message.startswith("scale[3]"):
        return  # only the kernels look at values
    first = next(n for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.is_floating_point())
    plain = arguments[first].layout == torch.strided and not arguments[first].is_nested
    if plain:
        with fwd.dual_level(), expected:
            dual = fwd.make_dual(arguments[first], torch.zeros_like(arguments[first]))
            OPERATORS[name][0](**{**arguments, first: dual})
    if "dtype" not in message:  # which autocast changes
        with torch.autocast("cpu", torch.bfloat16), expected:
            OPERATORS[name][0](**arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_unchanged_arguments_are_good(name: str) -> None:
    """So that each case above fails for what it changed."""
    assert call(name, {}).shape == (2, 16, 8)
    assert call(name, {}, requires_grad=True).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [0.0, -1.0, nan, inf])
def test_divisors_of_every_dtype_are_looked_at(dtype: torch.dtype, bad: float) -> None:
    arguments = attention_arguments()
    arguments = {n: v.to(dtype) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    with pytest.raises(ERRORS, match=re.escape("flatten.attention: scale[3]")):
        flatten_ext.attention(**arguments | {"scale": with_entry(bad, dtype)})


TENSORS = [
    (name, argument)
    for name, (_, make_arguments) in OPERATORS.items()
    for argument, value in make_arguments().items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_one_tensor_on_another_device(name: str, argument: str) -> None:
    value = OPERATORS[name][1]()[argument]
    first = argument in ("q", "x")
    other, message = next(iter(OPERATORS[name][1]())), "is on cpu, expected"
    message = (
        rf"{'k' if other == 'q' else 'weight'} {message}" if first else f"{argument} is on meta, expected"
    )
    with pytest.raises(ERRORS, match=rf"flatten\.{name}: {message} {other}'s device"):
        call(name, {argument: value.to("meta")})


@pytest.mark.parametrize(("name", "changes", "message"), CASES, ids=[f"{c[0]}: {c[2]}" for c in CASES])
def test_meta_tensors_are_checked_alike(name: str, changes: dict, message: str) -> None:
    arguments = {**OPERATORS[name][1](), **changes}
    tensors = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
    strided = all(t.layout == torch.strided and not t.is_nested and not t.is_quantized for t in tensors)
    if message.startswith("scale[3]") or not strided:
        return  # a meta tensor has no values, and no layout but this
    arguments = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    with pytest.raises(ERRORS, match=re.escape(f"flatten.{name}: {message}")):
        OPERATORS[name][0](**arguments)


# What the schema refuses before any kernel sees it; torch's words, naming the argument.
WRONG_TYPES = [
    ("attention", {"q": [[[1.0]]]}, "q"),
    ("attention", {"k": "k"}, "k"),
    ("attention", {"num_heads": 2.5}, "num_heads"),
    ("attention", {"num_heads": None}, "num_heads"),
    ("attention", {"num_heads": "2"}, "num_heads"),
    ("attention", {"scale": 2.0}, "scale"),
    ("attention", {"size": 4.5}, "size"),
    ("attention", {"size": "44"}, "size"),
    ("attention", {"size": [4.5, 4]}, "size"),
    ("attention", {"window": ["a", 2]}, "window"),
    ("attention", {"shift": [None, 1]}, "shift"),
    ("attention", {"focusing_factor": "3"}, "focusing_factor"),
    ("attention", {"focusing_factor": None}, "focusing_factor"),
    ("attention", {"eps": [1e-6]}, "eps"),
    ("linear_attention", {"eps": None}, "eps"),
    ("depthwise_conv", {"size": None}, "size"),
    ("depthwise_conv", {"bias": 1.0}, "bias"),
]


@pytest.mark.parametrize(("name", "changes", "argument"), WRONG_TYPES)
def test_wrong_types(name: str, changes: dict, argument: str) -> None:
    with pytest.raises(ERRORS, match=rf"'{argument}'"):
        call(name, changes)


@pytest.mark.parametrize("name", OPERATORS)
def test_integers_beyond_64_bits(name: str) -> None:
    with pytest.raises((*ERRORS, OverflowError)):
        call(name, {"size": [2**63, 4]})


# --- the internal operators
def backward_arguments(**changes) -> dict:
    arguments = attention_arguments()
    names = list(arguments)
    state = internal.attention_forward(**arguments, saved_windows=8)[1]
    arguments = {"grad_out": randn(2, 16, 8), **{n: arguments[n] for n in names}}
    return {**arguments, "state": state, "output_mask": [True] * 7, **changes}


STATE = 2 * 4 * (4 + 1) * 8  # images, windows, S and m of each head

BACKWARD_CASES: list[Case] = [
    *token_cases("grad_out"),
    ({"grad_out": randn(2, 15, 8)}, "grad_out has shape (2, 15, 8), expected (2, 16, 8)"),
    ({"grad_out": randn(2, 16, 8).double()}, "grad_out has dtype float64, expected the input's float32"),
    ({"grad_out": randn(2, 16, 8, device="meta")}, "grad_out is on meta, expected the input's device cpu"),
    (
        {"state": randn(STATE - 1)},
        f"state has {STATE - 1} elements of float32, expected what attention_forward",
    ),
    ({"state": randn(STATE).double()}, f"state has {STATE} elements of float64"),
    ({"state": randn(STATE, 2)[:, 0]}, f"state has {STATE} elements of float32"),
    ({"state": randn(STATE, device="meta")}, "state is on meta, expected q's device cpu"),
    ({"state": randn(STATE).to_sparse()}, "state is not a dense strided tensor"),
    ({"output_mask": []}, "output_mask has 0 entries, expected 7"),
    ({"output_mask": [True] * 6}, "output_mask has 6 entries, expected 7"),
    ({"output_mask": [True] * 8}, "output_mask has 8 entries, expected 7"),
    ({"scale": None}, "output_mask asks for the gradient of scale, which is None"),
    ({"key_bias": None}, "output_mask asks for the gradient of key_bias, which is None"),
    ({"dwc_bias": None}, "output_mask asks for the gradient of dwc_bias, which is None"),
    (
        {"dwc_weight": None, "dwc_bias": None},
        "output_mask asks for the gradient of dwc_weight, which is None",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BACKWARD_CASES, ids=[c[1] for c in BACKWARD_CASES])
def test_attention_backward(changes: dict, message: str) -> None:
    with pytest.raises(ERRORS, match=re.escape(f"flatten.attention_backward: {message}")):
        internal.attention_backward(**backward_arguments(**changes))


def test_attention_backward_checks_what_the_forward_checks() -> None:
    assert len(internal.attention_backward(**backward_arguments())) == 7
    for _, changes, message in [case for case in CASES if case[0] == "attention"]:
        with pytest.raises(ERRORS, match=rf"flatten\.attention(_backward)?: {re.escape(message)}"):
            internal.attention_backward(**backward_arguments(**changes))


@pytest.mark.parametrize("argument", ["scale", "key_bias"])
def test_linear_attention_has_no_focus(argument: str) -> None:
    arguments = attention_arguments() | {"scale": None, "key_bias": None, "focusing_factor": None}
    arguments[argument] = attention_arguments()[argument]
    with pytest.raises(ERRORS, match="scale and key_bias belong to the focused mapping"):
        internal.attention_forward(**arguments, saved_windows=0)


CONV_BACKWARD_CASES: list[Case] = [
    *token_cases("grad_out"),
    ({"grad_out": randn(2, 16, 4)}, "grad_out has shape (2, 16, 4), expected (2, 16, 8)"),
    ({"output_mask": [True, True]}, "output_mask has 2 entries, expected 3"),
    ({"output_mask": [False] * 4}, "output_mask has 4 entries, expected 3"),
    ({"bias": None}, "output_mask asks for the gradient of bias, which is None"),
]


@pytest.mark.parametrize(("changes", "message"), CONV_BACKWARD_CASES, ids=[c[1] for c in CONV_BACKWARD_CASES])
def test_depthwise_conv_backward(changes: dict, message: str) -> None:
    arguments = {"grad_out": randn(2, 16, 8), **conv_arguments(), "output_mask": [True] * 3}
    assert len(internal.depthwise_conv_backward(**arguments)) == 3
    with pytest.raises(ERRORS, match=re.escape(f"flatten.depthwise_conv_backward: {message}")):
        internal.depthwise_conv_backward(**arguments | changes)
