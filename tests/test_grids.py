"""A state_dict knows what map its learned positions tile."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

from flatten_ext import FocusedLinearAttention


def test_a_state_of_another_map_is_refused(tmp_path: Path) -> None:
    """4 x 9 positions are as many as 6 x 6."""
    source, square = (FocusedLinearAttention(8, 2, positional_encoding=size) for size in ((4, 9), (6, 6)))
    torch.save(source.state_dict(), tmp_path / "module.pth")
    saved = torch.load(tmp_path / "module.pth", weights_only=True)
    FocusedLinearAttention(8, 2, positional_encoding=(4, 9)).load_state_dict(saved)
    for copied in (copy.deepcopy(square), pickle.loads(pickle.dumps(square))):
        with pytest.raises(RuntimeError, match=r"positional_encoding: .* map of \(4, 9\).*\(6, 6\)"):
            copied.load_state_dict(saved)
    square.load_state_dict(dict(saved))  # without its metadata, a state of this very module


def test_no_positions_no_map() -> None:
    state_dict = FocusedLinearAttention(8, 2).state_dict()
    assert not any("grid" in facts for facts in state_dict._metadata.values())
    FocusedLinearAttention(8, 2).load_state_dict(state_dict)


def test_the_keys_stay() -> None:
    module = FocusedLinearAttention(8, 2, positional_encoding=(4, 9))
    assert module.state_dict().keys() == {
        *("scale", "positional_encoding", "dwc.weight", "dwc.bias"),
        *(f"{layer}.{name}" for layer in ("qkv", "proj") for name in ("weight", "bias")),
    }
