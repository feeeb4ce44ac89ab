"""FocusedLinearAttention with the general form's options, padding masks and contexts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from flatten_ext import FocusedLinearAttention, reference, rotary_table

OPTIONS = {
    "mlla": {"feature_map": "elu", "rotary": "channels", "gate": "silu", "kernel_size": 3},
    "rala": {"feature_map": "elu", "rotary": "heads", "gate": True},
    "mala": {
        "feature_map": "elu", "rotary": True, "gate": "none", "normalizer": "magnitude",
        "similarity_scale": 0.5,
    },
    "inline": {"feature_map": "none", "normalizer": "subtract", "similarity_scale": 0.5},
    "relu": {"feature_map": "relu", "kernel_size": None, "positional_encoding": (4, 6)},
    "focused-rotary": {"rotary": "heads", "num_prefix_tokens": 2, "positional_encoding": (4, 6)},
    "windows": {
        "feature_map": "elu", "rotary": "heads", "window": (2, 3), "shift": (1, 2), "gate": "sigmoid",
    },
}  # fmt: skip


def module_of(name: str, **more) -> FocusedLinearAttention:
    torch.manual_seed(0)
    module = FocusedLinearAttention(16, 4, **(OPTIONS[name] | more), dtype=torch.float64)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_formula_between_the_projections(name: str) -> None:
    module, size = module_of(name), (4, 6)
    options = OPTIONS[name]
    x = torch.randn(2, module.num_prefix_tokens + 24, 16, dtype=torch.float64)
    q, k, v = module.qkv(x).chunk(3, -1)
    rotary = options.get("rotary")
    heads = None if rotary == "channels" else 4
    table = None
    if rotary:
        of = options.get("window", size)
        prefix = module.num_prefix_tokens
        table = rotary_table(of, 16, heads, num_prefix_tokens=prefix, dtype=torch.float64)
    gate = options.get("gate")
    expected = reference.attention(
        q, k, v, 4, None if module.scale is None else F.softplus(module.scale).flatten(),
        None if module.positional_encoding is None else module.positional_encoding[0],
        None if module.dwc is None else module.dwc.weight, None if module.dwc is None else module.dwc.bias,
        size, module.window, module.shift, feature_map=options.get("feature_map", "focused"), rotary=table,
        normalizer=options.get("normalizer", "divide"), similarity_scale=options.get("similarity_scale", 1.0),
        gate=None if gate is None else module.gate(x),
        gate_activation=gate if isinstance(gate, str) else "none",
    )  # fmt: skip
    torch.testing.assert_close(module(x, size), module.proj(expected))


@pytest.mark.parametrize("name", ["mala", "inline", "relu", "rala"])
def test_a_padded_map_is_the_smaller_map(name: str) -> None:
    """5 x 6 in 8 x 8, taps included; padding may hold anything."""
    options = OPTIONS[name] | {"rotary": None, "positional_encoding": None}
    module = module_of(name, **{"rotary": None, "positional_encoding": None})
    assert options["feature_map"] == module.feature_map
    x = torch.randn(2, 30, 16, dtype=torch.float64, requires_grad=True)
    for filler in (0.0, 1e3, float("nan")):
        padded = F.pad(x.unflatten(1, (5, 6)), (0, 0, 0, 2, 0, 3), value=filler).flatten(1, 2)
        mask = F.pad(torch.zeros(2, 5, 6, dtype=torch.bool), (0, 2, 0, 3), value=True).flatten(1)
        out = module(padded, (8, 8), key_padding_mask=mask).unflatten(1, (8, 8))[:, :5, :6].flatten(1, 2)
        expected = module(x, (5, 6))
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        if filler == filler:
            found, wanted = (
                torch.autograd.grad(y.square().sum(), [x, *module.parameters()]) for y in (out, expected)
            )
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_table_of_the_padded_map_is_that_of_the_smaller_one() -> None:
    """Rotation counts rows and columns from 0, so it holds for rotated attention as well."""
    module = module_of("mlla")
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    padded = F.pad(x.unflatten(1, (5, 6)), (0, 0, 0, 2, 0, 3), value=7.0).flatten(1, 2)
    mask = F.pad(torch.zeros(2, 5, 6, dtype=torch.bool), (0, 2, 0, 3), value=True).flatten(1)
    out = module(padded, (8, 8), key_padding_mask=mask).unflatten(1, (8, 8))[:, :5, :6].flatten(1, 2)
    torch.testing.assert_close(out, module(x, (5, 6)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention(bias: bool) -> None:
    module = module_of("rala", rotary=None, kernel_size=None, qkv_bias=bias)
    x, context = (torch.randn(2, n, 16, dtype=torch.float64) for n in (7, 11))
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[:, 8:] = True
    q = module.qkv(x)[..., :16]
    k, v = module.qkv(context)[..., 16:].chunk(2, -1)
    expected = reference.attention(q, k[:, :8], v[:, :8], 4, feature_map="elu", gate=module.gate(x))
    found = module(x, key_padding_mask=mask, context=context)
    torch.testing.assert_close(found, module.proj(expected))


def test_only_the_focused_map_has_a_scale() -> None:
    assert "scale" in FocusedLinearAttention(8, 2).state_dict()
    names = set(FocusedLinearAttention(8, 2, feature_map="elu", gate="silu").state_dict())
    assert "scale" not in names
    assert {"gate.weight", "gate.bias"} <= names


@pytest.mark.parametrize("name", OPTIONS)
def test_deepcopy_pickle_compile_and_repr(name: str) -> None:
    module = module_of(name)
    x = torch.randn(2, module.num_prefix_tokens + 24, 16, dtype=torch.float64)
    expected = module(x, (4, 6))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, (4, 6)), expected)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, (4, 6)), expected)
    for option, value in OPTIONS[name].items():
        if option in ("feature_map", "normalizer", "similarity_scale"):
            assert f"{option}={value}" in repr(module)


def test_a_table_that_was_made_in_inference_mode_serves_a_training_step() -> None:
    module = FocusedLinearAttention(16, 4, feature_map="elu", rotary="heads")
    x = torch.randn(2, 9 * 7, 16)
    with torch.inference_mode():
        module(x, (9, 7))
    module(x, (9, 7)).sum().backward()


def test_torch_fx() -> None:
    module = module_of("mala")
    traced = torch.fx.symbolic_trace(module)
    x = torch.randn(2, 24, 16, dtype=torch.float64)
    mask = torch.rand(2, 24) < 0.3
    assert torch.equal(traced(x, (4, 6)), module(x, (4, 6)))
    assert torch.equal(traced(x, (4, 6), mask), module(x, (4, 6), mask))
    with pytest.raises(ValueError, match=r"context was given to a module that torch\.fx traced"):
        traced(x, (4, 6), context=x)


REFUSED = {
    "feature_map": ({"feature_map": "gelu"}, "feature_map must be one of 'focused', .* it is 'gelu'"),
    "normalizer": ({"normalizer": "mean"}, "normalizer must be one of 'divide', .* it is 'mean'"),
    "gate": ({"gate": "tanh"}, "gate must be one of 'none', 'silu', 'sigmoid', but it is 'tanh'"),
    "rotary": ({"rotary": "rows"}, "rotary is 'rows', expected None, 'heads' or 'channels'"),
    "narrow heads": ({"rotary": "heads", "num_heads": 8}, "rotary is 'heads' with 2 channels to rotate"),
    "power": ({"feature_map": "elu", "focusing_factor": 2}, "focusing_factor is 2, expected its default 3"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FocusedLinearAttention(**({"dim": 16, "num_heads": 4} | options))


def test_refused_masks_and_contexts() -> None:
    module, x = FocusedLinearAttention(16, 4), torch.randn(2, 24, 16)
    for mask in (torch.ones(2, 24), torch.ones(2, 23, dtype=torch.bool), torch.ones(24, dtype=torch.bool)):
        with pytest.raises(
            ValueError, match=r"key_padding_mask is \w+ \(.*\), expected bool \(2, 24\), True"
        ):
            module(x, (4, 6), key_padding_mask=mask)
    for name, value in (
        ("kernel_size", 5), ("window", (2, 3)), ("rotary", "heads"), ("positional_encoding", (4, 6)),
    ):  # fmt: skip
        bound = FocusedLinearAttention(16, 4, **({"kernel_size": None} | {name: value}))
        with pytest.raises(ValueError, match=f"context was given to a module with {name}, expected"):
            bound(x, (4, 6), context=x)
    plain = FocusedLinearAttention(16, 4, kernel_size=None)
    for context in (x[:1], x[..., :8], x[0]):
        with pytest.raises(ValueError, match=r"context is \(.*\), expected \(2, tokens, 16\)"):
            plain(x, context=context)
