"""Key weights: a weight of 0 drops a key, whatever it holds, from the sums and not from the taps."""

from __future__ import annotations

import math

import pytest
import torch
from general_cases import NORMALIZERS, General, results, upstream
from implementations import every_implementation

MAPS = ["focused", "elu", "relu", "none", None]
GARBAGE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 3e38}


def case_of(feature_map, **options) -> General:
    return General(
        **{"feature_map": feature_map, "key_bias": feature_map in ("focused", "elu", "relu")} | options
    )


def fill(arguments: dict, dropped: torch.Tensor, value: float) -> None:
    """`value` in every second channel of k and v where `dropped` (B, M) is true."""
    for name in ("k", "v"):
        arguments[name][..., ::2] = torch.where(dropped[..., None], value, arguments[name][..., ::2])


def without(arguments: dict, dropped: torch.Tensor) -> dict:
    """The call in which the dropped keys do not exist; as many in every image."""
    kept = {**arguments, "key_weight": None}
    for name in ("k", "v", "key_weight"):
        kept[name] = arguments[name][~dropped].unflatten(0, (len(dropped), -1))
    if "key_bias" in arguments:
        kept["key_bias"] = arguments["key_bias"][~dropped[0]]
    return kept


@every_implementation
@pytest.mark.parametrize("value", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("feature_map", MAPS)
def test_a_dropped_key_is_not_there(operators, feature_map, normalizer, value):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        case = case_of(feature_map, keys=9, key_weight="keys", normalizer=normalizer, gate="silu", batch=2)
        arguments = case.arguments(dtype, seed=7)
        dropped = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool).expand(2, -1)
        arguments["key_weight"] = arguments["key_weight"].masked_fill(dropped, 0)
        grad_out = upstream(arguments)
        expected = results(getattr(operators, case.operator), without(arguments, dropped), grad_out)
        fill(arguments, dropped, value)
        found = results(getattr(operators, case.operator), arguments, grad_out)
        for name, want in expected.items():
            have = found[name]
            if name in ("k", "v"):
                assert (have[dropped] == 0).all(), f"the gradient of a dropped key's {name}"
            if name in ("k", "v", "key_weight"):
                have = have[~dropped].unflatten(0, (2, -1))
            elif name == "key_bias":
                assert (have[dropped[0]] == 0).all()
                have = have[~dropped[0]]
            torch.testing.assert_close(
                have, want, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )


@every_implementation
@pytest.mark.parametrize("feature_map", ["elu", "relu", "none", None])
def test_a_key_dropped_from_one_head(operators, feature_map):
    """Where a map does not mix the heads, a head's garbage is its own."""
    case = case_of(feature_map, key_weight="heads", head_dim=4, heads=2, normalizer="subtract")
    arguments = case.arguments(seed=2)
    arguments["key_weight"][:, 3, 1] = 0
    function = getattr(operators, case.operator)
    expected = results(function, arguments, upstream(arguments))
    for name in ("k", "v"):
        arguments[name][:, 3, 4:] = math.nan
    found = results(function, arguments, upstream(arguments))
    for name, want in expected.items():
        if name != "key_weight":  # the derivative by a weight of 0 reads the key
            torch.testing.assert_close(found[name], want, rtol=1e-12, atol=1e-12)
        assert torch.isfinite(found[name]).all()


@every_implementation
def test_the_focused_map_mixes_the_heads(operators):
    """phi's norms run over all channels: NaN in a head that dropped the key reaches a head that keeps it."""
    arguments = General(feature_map="focused", key_weight="heads").arguments()
    arguments["key_weight"][0, 3, 1] = 0
    arguments["k"][0, 3, 5] = math.nan
    out = operators.attention(**arguments)
    assert out[0, :, :4].isnan().all()
    assert torch.isfinite(out[0, :, 4:]).all()
    assert torch.isfinite(out[1]).all()


@every_implementation
@pytest.mark.parametrize("feature_map", ["focused", "elu", "relu", "none"])
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_nan_in_a_key_that_counts_is_handed_on(operators, place, feature_map):
    arguments = General(feature_map=feature_map, key_weight="keys").arguments()
    arguments["key_weight"][:, 0] = 0
    arguments[place][0, 4, 1] = math.nan
    out = operators.attention(**arguments)
    assert out[0].isnan().any()
    assert torch.isfinite(out[1]).all()


@every_implementation
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_weight_of_nan_is_handed_on(operators, normalizer):
    arguments = General(feature_map="elu", key_weight="keys", normalizer=normalizer).arguments()
    arguments["key_weight"][0, 3] = math.nan
    out = operators.attention(**arguments)
    assert out[0].isnan().all()
    assert torch.isfinite(out[1]).all()


@every_implementation
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_window_without_keys(operators, normalizer, eps):
    """The attention term and all its gradients are 0 there, and the other windows do not notice."""
    case = General(
        size=(4, 6), window=(2, 3), shift=(1, 2), feature_map="elu", key_weight="keys", normalizer=normalizer,
        eps=eps, similarity_scale=0.5,
    )  # fmt: skip
    arguments = case.arguments(seed=4)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    of_window = (((rows - 1) % 4 // 2 == 1) & ((columns - 2) % 6 // 3 == 0)).flatten()
    grad_out = upstream(arguments)
    whole = results(operators.attention, arguments, grad_out)
    arguments["key_weight"][:, of_window] = 0
    arguments["k"][:, of_window] = math.nan
    arguments["v"][:, of_window] = math.inf
    arguments["q"][:, of_window] = math.nan
    found = results(operators.attention, arguments, grad_out)
    for name in ("out", "q", "k", "v", "key_weight"):
        assert (found[name][:, of_window] == 0).all(), name
        torch.testing.assert_close(
            found[name][:, ~of_window], whole[name][:, ~of_window], rtol=1e-12, atol=1e-12
        )


@every_implementation
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_an_image_without_keys(operators, normalizer):
    arguments = General(feature_map="elu", key_weight="keys", normalizer=normalizer, eps=0.0).arguments()
    arguments["key_weight"][1] = 0
    found = results(operators.attention, arguments, upstream(arguments))
    for name, value in found.items():
        assert torch.isfinite(value).all(), name
        assert (value[1] == 0).all(), name


@every_implementation
def test_the_taps_see_a_dropped_key(operators):
    case = General(size=(4, 3), feature_map="elu", key_weight="keys", kernel=(3, 3), taps="channel")
    arguments = case.arguments()
    arguments["key_weight"][:, 5] = 0
    plain = {k: a for k, a in arguments.items() if k not in ("dwc_weight", "dwc_bias", "size")}
    taps = operators.depthwise_conv(arguments["v"], arguments["dwc_weight"], arguments["dwc_bias"], [4, 3])
    torch.testing.assert_close(operators.attention(**arguments), operators.attention(**plain) + taps)


@every_implementation
@pytest.mark.parametrize("feature_map", MAPS)
def test_a_padded_map_equals_the_map(operators, feature_map):
    """5 x 6 in 8 x 8: weights mask the padding for attention, zeros in v for the taps."""
    case = case_of(
        feature_map, size=(5, 6), kernel=(5, 5), taps="channel", normalizer="divide", key_bias=False
    )
    arguments = case.arguments(seed=6)
    arguments["gate"] = torch.randn(2, 30, 8, dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    inside = ((rows < 5) & (columns < 6)).flatten()
    padded = dict(arguments, size=[8, 8], key_weight=inside.double().expand(2, -1))
    for name, padding in (("q", math.nan), ("k", math.nan), ("v", 0.0), ("gate", 1.0)):
        x = arguments[name]
        padded[name] = x.new_full((2, 64, x.shape[2]), padding)
        padded[name][:, inside] = x
    function = getattr(operators, case.operator)
    torch.testing.assert_close(function(**padded)[:, inside], function(**arguments), rtol=1e-12, atol=1e-13)


@every_implementation
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_the_derivative_by_a_weight_of_zero(operators, normalizer):
    """What a weight of 0 would change if it rose: the one-sided derivative, which reads the dropped key."""
    case = General(feature_map="elu", key_weight="heads", normalizer=normalizer, rotary="heads", batch=1)
    arguments = case.arguments(seed=8)
    arguments["key_weight"][0, 2, 0] = 0
    grad_out = upstream(arguments)
    found = results(operators.attention, arguments, grad_out)["key_weight"][0, 2, 0]

    def loss(step):
        raised = arguments["key_weight"].clone()
        raised[0, 2, 0] = step
        return (operators.attention(**{**arguments, "key_weight": raised}) * grad_out).sum()

    h = 1e-4  # a forward difference of second order
    expected = (4 * loss(h) - loss(2 * h) - 3 * loss(0)) / (2 * h)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@every_implementation
def test_the_gradient_has_the_weight_s_dtype(operators):
    for param_dtype in (torch.float32, torch.bfloat16):
        arguments = General(feature_map="elu", key_weight="heads").arguments(torch.bfloat16)
        arguments["key_weight"] = arguments["key_weight"].to(param_dtype)
        found = results(operators.attention, arguments)
        assert found["key_weight"].dtype == param_dtype
        assert found["out"].dtype == torch.bfloat16


@every_implementation
def test_a_bool_mask_is_refused_with_the_words_that_convert_it(operators):
    arguments = General(feature_map="elu").arguments()
    mask = torch.ones(2, 12, dtype=torch.bool)
    with pytest.raises((ValueError, RuntimeError), match=r"key_weight.*mask\.to\(q\.dtype\)"):
        operators.attention(**arguments, key_weight=mask)


def test_all_of_the_saved_state_was_written():
    """It has room for u and W, which this call's normalizer does not read."""
    q, k, v = torch.rand(3, 2, 40, 8).unbind()
    rest = dict.fromkeys(("scale", "key_bias", "dwc_weight", "dwc_bias", "size", "window", "shift"))
    rest |= {"focusing_factor": 3.0, "eps": 1e-6, "saved_windows": 2, "key_weight": torch.rand(2, 40)}
    count = torch.ops.flatten.attention_forward(q, k, v, 2, **rest)[1].numel()
    for _ in range(8):
        junk = [torch.full((count,), float("nan")) for _ in range(8)]
        del junk  # whose memory a new tensor may get
        assert torch.ops.flatten.attention_forward(q, k, v, 2, **rest)[1].isfinite().all()
