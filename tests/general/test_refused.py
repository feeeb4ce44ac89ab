"""Bad combinations are refused, and the message names the argument."""

from __future__ import annotations

import pytest
import torch
from general_cases import General
from implementations import every_implementation

NONE, ELU, RELU = General(), General(feature_map="elu"), General(feature_map="relu")
IMAGE_TAPS = General(kernel=(3, 3), taps="image")
REFUSED = {
    "unknown feature_map": (NONE, {"feature_map": "gelu"}, "feature_map.*'focused', 'elu', 'relu'.*'gelu'"),
    "unknown normalizer": (NONE, {"normalizer": "mean"}, "normalizer.*'divide'.*'mean'"),
    "unknown gate_activation": (
        General(gate="none"), {"gate_activation": "tanh"}, "gate_activation.*'silu'.*'tanh'",
    ),
    "an activation without a gate": (NONE, {"gate_activation": "silu"}, "gate_activation.*gate"),
    "scale with elu": (ELU, {"scale": torch.ones(8)}, "scale.*'focused'.*'elu'"),
    "scale with none": (NONE, {"scale": torch.ones(8)}, "scale.*'focused'.*'none'"),
    "a power with relu": (RELU, {"focusing_factor": 2.0}, "focusing_factor.*'focused'.*'relu'"),
    "a bool mask": (
        NONE, {"key_weight": torch.ones(2, 12, dtype=torch.bool)}, r"key_weight.*mask\.to\(q\.dtype\)",
    ),
    "a bias of image taps": (IMAGE_TAPS, {"dwc_bias": torch.zeros(8).double()}, "bias.*five dimensions"),
    "a table for other tokens": (NONE, {"rotary": torch.zeros(11, 2, 2)}, r"rotary.*12.*\(11, 2, 2\)"),
    "a table of one token": (NONE, {"rotary": torch.zeros(1, 2, 2)}, r"rotary.*12.*\(1, 2, 2\)"),
    "a table of half the heads": (
        General(heads=4), {"rotary": torch.zeros(12, 4, 2)}, r"rotary.*\(12, 4, 2\)",
    ),
    "a table for odd heads": (
        General(head_dim=3), {"rotary": torch.zeros(12, 3, 2)}, "rotary.*3 channels.*even",
    ),
    "a table for the map, in windows": (
        General(size=(4, 6), window=(2, 3)), {"rotary": torch.zeros(24, 2, 2)}, r"rotary.*6.*\(24, 2, 2\)",
    ),
    "a table with a gradient": (
        NONE, {"rotary": torch.zeros(12, 2, 2, requires_grad=True)}, r"rotary.*no gradient.*detach\(\)",
    ),
}  # fmt: skip


@every_implementation
@pytest.mark.parametrize(("case", "more", "message"), REFUSED.values(), ids=REFUSED)
def test_attention_refuses(operators, case, more, message):
    arguments = case.arguments()
    with pytest.raises((ValueError, RuntimeError), match=message):
        operators.attention(**(arguments | more))


@every_implementation
def test_the_states_refuse(operators):
    k = v = torch.randn(2, 12, 8)
    with pytest.raises((ValueError, RuntimeError), match=r"normalizer_k.*feature_map 'none'.*'elu'"):
        operators.attention_state(k, v, 2, feature_map="elu", normalizer_k=k)
    state = operators.attention_state(k, v, 2, feature_map="none")
    with pytest.raises((ValueError, RuntimeError), match=r"normalizer_q.*feature_map 'none'.*'relu'"):
        operators.attention_from_state(k, state, 2, feature_map="relu", normalizer_q=k)
    for heads, channels in ((4, 8), (2, 12), (1, 8)):
        with pytest.raises((ValueError, RuntimeError), match=rf"state.*num_heads = {heads}.*\(2, 2, 5, 5\)"):
            operators.attention_from_state(torch.randn(2, 3, channels), state, heads, feature_map="none")
