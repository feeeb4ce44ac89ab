"""What is wrong with an argument of the general form: each gives one clear error, from every entry."""

from __future__ import annotations

import re

import pytest
import torch
import torch.autograd.forward_ad as fwd
from bad_arguments import NESTED, inf, nan, nested, positive, quantized, randn, with_entry

import flatten_ext

ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError)


def general_arguments() -> dict:
    """Two images of 4 x 4 tokens, two heads of four channels, shifted windows: every argument given."""
    return {
        **{name: randn(2, 16, 8) for name in "qkv"}, "num_heads": 2, "size": [4, 4], "window": [2, 2],
        "shift": [1, 1], "rotary": randn(4, 2, 2), "key_weight": positive(2, 16), "normalizer": "magnitude",
        "similarity_scale": 0.5, "gate": randn(2, 16, 8), "gate_activation": "silu",
    }  # fmt: skip


def attention_arguments() -> dict:
    return {**general_arguments(), "feature_map": "elu", "key_bias": randn(4, 8)}


def linear_arguments() -> dict:
    return {**general_arguments(), "normalizer_q": positive(2, 16, 8), "normalizer_k": positive(2, 16, 8)}


def state_arguments() -> dict:
    return {
        "k": randn(2, 16, 8), "v": randn(2, 16, 6), "num_heads": 2, "feature_map": "none",
        "key_bias": randn(16, 8), "rotary": randn(16, 4, 2), "key_weight": positive(2, 16, 2),
        "normalizer_k": positive(2, 16, 8),
    }  # fmt: skip


def from_state_arguments() -> dict:
    return {
        "q": randn(2, 9, 8), "state": positive(2, 2, 5, 4), "num_heads": 2, "feature_map": "none",
        "rotary": randn(9, 2, 2), "normalizer_q": positive(2, 9, 8), "normalizer": "subtract",
        "similarity_scale": 2.0, "gate": randn(2, 9, 6), "gate_activation": "sigmoid",
    }  # fmt: skip


OPERATORS = {
    "attention": (flatten_ext.attention, attention_arguments),
    "linear_attention": (flatten_ext.linear_attention, linear_arguments),
    "attention_state": (flatten_ext.attention_state, state_arguments),
    "attention_from_state": (flatten_ext.attention_from_state, from_state_arguments),
}
SHAPES = {name: {n: tuple(t.shape) for n, t in make().items() if isinstance(t, torch.Tensor)}
          for name, (_, make) in OPERATORS.items()}  # fmt: skip
Case = tuple[dict, str]


def beside_cases(operator: str, name: str) -> list[Case]:
    """What a gate, or the features of the normalizer, may not be."""
    shape = SHAPES[operator][name]
    first = "k" if operator == "attention_state" else "q"
    fewer = (shape[0], shape[1] - 1, shape[2])
    return [
        ({name: randn(*fewer)}, f"{name} has shape {fewer}, expected {shape}"),
        ({name: randn(*shape[:2], shape[2] + 2)}, f"{name} has shape {(*shape[:2], shape[2] + 2)}"),
        ({name: randn(*shape[:2])}, f"{name} has shape {shape[:2]}, expected 3 dimensions"),
        ({name: randn(*shape).double()}, f"{name} has dtype float64, expected {first}'s float32"),
        ({name: randn(*shape).bfloat16()}, f"{name} has dtype bfloat16, expected {first}'s float32"),
        ({name: torch.ones(shape, dtype=torch.bool)}, f"{name} has dtype Bool, expected float32, float16"),
        ({name: randn(*shape).to_sparse()}, f"{name} is not a dense strided tensor"),
        *[({name: nested(layout)}, f"{name} is a nested tensor, expected a dense") for layout in NESTED],
    ]


def table_cases(operator: str) -> list[Case]:
    n = SHAPES[operator]["rotary"][0]
    expected = f"rotary must be ({n}, 2, 2), shared by the heads, or ({n}, 4, 2), but it is"
    return [
        *[
            ({"rotary": randn(*shape)}, f"{expected} {shape}")
            for shape in ((n - 1, 2, 2), (n, 1, 2), (n, 3, 2), (n, 2, 1), (n, 8), (2, n, 2, 2), (1, 2, 2))
        ],
        ({"rotary": randn(n, 2, 2).double()}, "rotary has dtype float64, expected float32"),
        ({"rotary": torch.ones(n, 2, 2, dtype=torch.int64)}, "rotary has dtype Long, expected float32"),
        ({"rotary": randn(n, 2, 2).to_sparse()}, "rotary is not a dense strided tensor"),
        ({"rotary": quantized(n, 2, 2)}, "rotary has dtype QUInt8, expected float32"),
        *[({"rotary": nested(layout)}, "rotary is a nested tensor, expected") for layout in NESTED],
    ]


def weight_cases() -> list[Case]:
    expected = "expected (2, 16) or (2, 16, 2)"
    return [
        *[
            ({"key_weight": positive(*shape)}, f"key_weight has shape {shape}, {expected}")
            for shape in ((2, 15), (16, 2), (1, 16), (2, 16, 1), (2, 16, 8), (16,), (2, 16, 2, 1))
        ],
        (
            {"key_weight": torch.ones(2, 16, dtype=torch.bool)},
            "key_weight has dtype Bool, expected float32: pass mask.to(q.dtype), True where a key counts",
        ),
        ({"key_weight": torch.ones(2, 16, dtype=torch.int64)}, "key_weight has dtype Long, expected float32"),
        ({"key_weight": positive(2, 16).double()}, "key_weight has dtype float64, expected float32"),
        ({"key_weight": positive(2, 16).half()}, "key_weight has dtype float16, expected float32"),
        ({"key_weight": positive(2, 16).to_sparse()}, "key_weight is not a dense strided tensor"),
        *[({"key_weight": nested(layout)}, "key_weight is a nested tensor") for layout in NESTED],
    ]


def query_cases() -> list[Case]:
    """What is said of a query's normalizer and gate."""
    return [
        ({"normalizer": "mean"}, "normalizer must be 'divide', 'none', 'subtract' or 'magnitude', but it is"),
        ({"normalizer": ""}, "normalizer must be 'divide', 'none', 'subtract' or 'magnitude', but it is ''"),
        (
            {"gate_activation": "tanh"},
            "gate_activation must be 'none', 'silu' or 'sigmoid', but it is 'tanh'",
        ),
        ({"gate": None}, "gate_activation is 's"),
        *[({"similarity_scale": c}, "similarity_scale is ") for c in (nan, inf, -inf)],
        *[
            ({"similarity_scale": c}, f"similarity_scale is {abs(c):g}, expected a number of float32")
            for c in (1e39, -1e300, 1e-39)
        ],
    ]


def map_cases(**elu: None) -> list[Case]:
    """What is said of features that are made here."""
    none = {"feature_map": "none"}
    return [
        (
            {"feature_map": "gelu"},
            "feature_map must be 'focused', 'elu', 'relu' or 'none', but it is 'gelu'",
        ),
        (
            {**elu, "feature_map": "elu", "focusing_factor": 2.0},
            "focusing_factor is 2, expected its default 3: it belongs to ",
        ),
        (
            {**none, "scale": positive(8)},
            "scale was given, expected None: it belongs to feature_map 'focused'",
        ),
        ({"eps": -1.0}, "eps is -1, expected a finite number >= 0"),
    ]


def cases() -> dict[str, list[Case]]:
    taps = {"size": [4, 4], "dwc_weight": randn(2, 8, 1, 3, 3)}
    return {
        "attention": [
            *beside_cases("attention", "gate"), *table_cases("attention"), *weight_cases(), *query_cases(),
            *map_cases(),
            ({**taps, "dwc_bias": randn(8)}, "dwc_bias was given with a dwc_weight of five dimensions"),
            *[
                ({**taps, "dwc_weight": randn(*shape)}, f"dwc_weight has shape {shape}, expected (2, 8, 1,")
                for shape in ((2, 4, 1, 3, 3), (1, 8, 1, 3, 3), (2, 8, 2, 3, 3))
            ],
            (
                {**taps, "dwc_weight": randn(2, 8, 1, 3, 2)},
                "dwc_weight has shape (2, 8, 1, 3, 2), expected an odd kernel height and width",
            ),
            (
                {"num_heads": 8},
                "rotary turns pairs of channels, but the heads have 1 channels, expected an even number",
            ),
            (
                {"window": None, "shift": None, "key_bias": None, "q": randn(2, 9, 8)},
                "rotary needs as many queries as keys, got 9 and 16",
            ),
        ],
        "linear_attention": [
            *beside_cases("linear_attention", "gate"), *beside_cases("linear_attention", "normalizer_q"),
            *beside_cases("linear_attention", "normalizer_k"), *table_cases("linear_attention"),
            *weight_cases(), *query_cases(),
            ({"v": randn(2, 16, 6)}, "gate has shape (2, 16, 8), expected (2, 16, 6)"),
        ],
        "attention_state": [
            *table_cases("attention_state"), *weight_cases(), *map_cases(normalizer_k=None),
            *beside_cases("attention_state", "normalizer_k"),
            ({"k": None}, "k is None, expected a tensor of (batch, tokens, channels)"),
            ({"k": randn(16, 8)}, "k has shape (16, 8), expected 3 dimensions"),
            ({"k": randn(2, 16, 8).long()}, "k has dtype"),
            ({"v": randn(2, 16, 7)}, "v has shape (2, 16, 7), expected (2, 16, channels for each of the 2"),
            ({"v": randn(2, 15, 6)}, "v has shape (2, 15, 6), expected (2, 16, channels for each of the 2"),
            ({"v": randn(2, 16, 6).half()}, "v has dtype float16, expected k's float32"),
            ({"num_heads": 3}, "num_heads is 3, expected a positive divisor of the 8 channels"),
            ({"num_heads": 0}, "num_heads is 0, expected a positive divisor of the 8 channels"),
            ({"key_bias": randn(15, 8)}, "key_bias has shape (15, 8), expected (16, 8)"),
            ({"feature_map": "elu"}, "normalizer_k goes with feature_map 'none', features that are mapped"),
        ],
        "attention_from_state": [
            *table_cases("attention_from_state"), *query_cases(),
            *beside_cases("attention_from_state", "normalizer_q"),
            *beside_cases("attention_from_state", "gate"),
            ({"q": None}, "q is None, expected a tensor of (batch, tokens, channels)"),
            ({"num_heads": 5}, "num_heads is 5, expected a positive divisor of the 8 channels"),
            ({"state": None}, "state is None, expected what attention_state returned"),
            *[
                (
                    {"state": randn(*shape)},
                    f"state must be (2, num_heads = 2, 5, D_v + 1) to go with q (2, 9, 8), but it is {shape}",
                )
                for shape in ((2, 2, 4, 4), (2, 1, 5, 4), (1, 2, 5, 4), (2, 2, 5, 1), (2, 2, 5), (9, 2, 5, 4))
            ],
            ({"state": positive(2, 2, 5, 4).double()}, "state has dtype float64, expected float32, in which"),
            ({"state": positive(2, 2, 5, 4).half()}, "state has dtype float16, expected float32, in which"),
            ({"state": positive(2, 2, 5, 4).to_sparse()}, "state is not a dense strided tensor"),
            ({"feature_map": "relu"}, "normalizer_q goes with feature_map 'none', features that are mapped"),
            (
                {"feature_map": "focused", "normalizer_q": None, "focusing_factor": 0.5},
                "focusing_factor is 0.5",
            ),
        ],
    }  # fmt: skip


CASES = [(name, *case) for name, of_operator in cases().items() for case in of_operator]
every_case = pytest.mark.parametrize(
    ("name", "changes", "message"), CASES, ids=[f"{name}: {message}" for name, _, message in CASES]
)


def words(name: str, message: str):
    return pytest.raises(ERRORS, match=re.escape(f"flatten.{name}: {message}"))


@every_case
def test_message(name: str, changes: dict, message: str) -> None:
    function, make = OPERATORS[name]
    with words(name, message):
        function(**{**make(), **changes})
    with torch.inference_mode(), words(name, message):
        function(**{**make(), **changes})
    with_gradients = {
        n: t.detach().requires_grad_()
        if isinstance(t, torch.Tensor) and t.is_floating_point() and n != "rotary"
        else t
        for n, t in {**make(), **changes}.items()
    }
    with words(name, message):
        function(**with_gradients)


@every_case
def test_message_by_other_ways(name: str, changes: dict, message: str) -> None:
    """In forward mode, where the reference runs, under autocast, of meta tensors."""
    function, make = OPERATORS[name]
    arguments = {**make(), **changes}
    first = next(iter(make()))
    tensor = arguments[first]
    if tensor is not None and tensor.is_floating_point():
        with fwd.dual_level(), words(name, message):
            function(**{**arguments, first: fwd.make_dual(tensor, torch.zeros_like(tensor))})
    if "dtype" not in message:
        with torch.autocast("cpu", torch.bfloat16), words(name, message):
            function(**arguments)
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    if all(t.layout == torch.strided and not t.is_nested and not t.is_quantized for t in tensors):
        meta = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
        with words(name, message):
            function(**meta)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_unchanged_arguments_are_good(name: str) -> None:
    """So that each case above fails for what it changed."""
    function, make = OPERATORS[name]
    shapes = {"attention_state": (2, 2, 5, 4), "attention_from_state": (2, 9, 6)}
    assert function(**make()).shape == shapes.get(name, (2, 16, 8))


@pytest.mark.parametrize(
    ("name", "argument"), [(name, n) for name in OPERATORS for n in SHAPES[name] if n not in "qk"]
)
def test_one_tensor_on_another_device(name: str, argument: str) -> None:
    function, make = OPERATORS[name]
    with pytest.raises(ERRORS, match=rf"flatten\.{name}: {argument} is on meta, expected \w+'s device cpu"):
        function(**{**make(), argument: make()[argument].to("meta")})


@pytest.mark.parametrize("name", ["attention_state", "attention_from_state"])
def test_divisors_are_looked_at(name: str) -> None:
    function, make = OPERATORS[name]
    changes = {"feature_map": "focused", "normalizer_k" if "k" in make() else "normalizer_q": None}
    with words(name, "scale[3] is zero, negative, infinite or NaN"):
        function(**{**make(), **changes, "scale": with_entry(0.0)})


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_table_has_no_gradient(name: str, grad_mode: bool) -> None:
    function, make = OPERATORS[name]
    arguments = make()
    arguments["rotary"].requires_grad_()
    with torch.set_grad_enabled(grad_mode), words(name, "rotary requires a gradient, but it is a table"):
        function(**arguments)


INTERNAL = torch.ops.flatten


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_mask": [True] * 8}, "output_mask has 8 entries, expected 7 or, with all tensors, 12"),
        ({"output_mask": [False] * 7 + [True] + [False] * 4}, "output_mask asks for the gradient of rotary"),
        (
            {"output_mask": [True] * 3 + [True] * 4},
            "output_mask asks for the gradient of scale, which is None",
        ),
        (
            {"gate": None, "gate_activation": "none"},
            "output_mask asks for the gradient of gate, which is None",
        ),
        ({"key_weight": None}, "output_mask asks for the gradient of key_weight, which is None"),
    ],
)
def test_attention_backward(changes: dict, message: str) -> None:
    arguments = attention_arguments() | dict.fromkeys(("scale", "dwc_weight", "dwc_bias"))
    arguments |= {"focusing_factor": 3.0, "eps": 1e-6, "grad_out": randn(2, 16, 8), "state": torch.empty(0)}
    mask = [n not in (3, 5, 6, 7, 10, 11) for n in range(12)]
    assert len(INTERNAL.attention_backward(**arguments, output_mask=mask)) == sum(mask)
    with pytest.raises(ERRORS, match=re.escape(f"flatten.attention_backward: {message}")):
        INTERNAL.attention_backward(**{**arguments, "output_mask": mask, **changes})


def test_the_backward_runs_in_inference_mode() -> None:
    """Called by itself, as a program that was exported with its backward calls it."""
    a = from_state_arguments() | {"scale": None, "focusing_factor": 3.0, "eps": 1e-6}
    mask, grad_out = [True, True, False, False, True, True], randn(2, 9, 6)
    expected = INTERNAL.attention_from_state_backward(grad_out, **a, output_mask=mask)
    with torch.inference_mode():
        found = INTERNAL.attention_from_state_backward(grad_out.clone(), **a, output_mask=mask)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("grad_out", "message"),
    [
        (randn(2, 2, 5, 5), "grad_out has shape (2, 2, 5, 5), expected (2, 2, 5, 4)"),
        (randn(2, 2, 5, 4).double(), "grad_out has dtype float64, expected float32"),
    ],
)
def test_state_backward(grad_out: torch.Tensor, message: str) -> None:
    arguments = state_arguments() | {"scale": None, "focusing_factor": 3.0, "eps": 1e-6}
    mask = [True, True, False, True, False, True, True]
    assert len(INTERNAL.attention_state_backward(randn(2, 2, 5, 4), **arguments, output_mask=mask)) == 5
    with pytest.raises(ERRORS, match=re.escape(f"flatten.attention_state_backward: {message}")):
        INTERNAL.attention_state_backward(grad_out, **arguments, output_mask=mask)


def test_from_state_backward() -> None:
    arguments = from_state_arguments() | {"scale": None, "focusing_factor": 3.0, "eps": 1e-6}
    mask = [True, True, False, False, True, True]
    assert len(INTERNAL.attention_from_state_backward(randn(2, 9, 6), **arguments, output_mask=mask)) == 4
    for grad_out, message in (
        (randn(2, 9, 8), "grad_out has shape (2, 9, 8), expected (2, 9, 6)"),
        (randn(2, 9, 6).half(), "grad_out has dtype float16, expected the input's float32"),
    ):
        with pytest.raises(ERRORS, match=re.escape(f"flatten.attention_from_state_backward: {message}")):
            INTERNAL.attention_from_state_backward(grad_out, **arguments, output_mask=mask)
    with pytest.raises(ERRORS, match="output_mask has 5 entries, expected 6"):
        INTERNAL.attention_from_state_backward(randn(2, 9, 6), **arguments, output_mask=mask[1:])
