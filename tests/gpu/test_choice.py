"""Which kernels a call takes, and what is said of calls that the tensor cores do not take."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import half, make, on_map

WINDOW, STATE, OUTPUT = "tensorcore::forward_window", "tensorcore::forward_state", "forward_output"
WINDOW_BACK, QUERY, KEY = "tensorcore::backward_window", "tensorcore::backward_query", "backward_key"
HEADS, HEADS_BACK = "tensorcore::heads::accumulate, multiply", "tensorcore::heads::multiply, differentiate"
GENERAL_BACK = "general::gradient_of_query, gradient_of_key"
BY_HEAD = "general::state_by_head, output_by_head"
BY_HEAD_BACK = "general::grad_state_by_head, grad_query_by_head, grad_key_by_head"

# Of forward and backward: the kernels, and why they are general ones.
CHOICES = [
    (half(on_map(14, 14, window=(7, 7), kernel=(5, 5))), (WINDOW, None), (WINDOW_BACK, None)),
    (
        half(on_map(20, 20, kernel=(5, 5), key_bias=True), torch.float16),
        (f"{STATE}, {OUTPUT}", None),
        (f"{QUERY}, {KEY}", None),
    ),
    (
        on_map(7, 7, kernel=(5, 5)),
        (BY_HEAD, "neither bfloat16 nor float16"),
        (BY_HEAD_BACK, "neither bfloat16 nor float16"),
    ),
    (
        on_map(7, 7, kernel=(5, 5), head_dim=64),
        ("general::attend_small", "neither bfloat16 nor float16"),
        (GENERAL_BACK, "neither bfloat16 nor float16"),
    ),
    (half(on_map(7, 7, prefix=1, kernel=(5, 5))), (HEADS, None), (HEADS_BACK, None)),
    (half(on_map(7, 7, heads=4, head_dim=24)), (HEADS, None), (HEADS_BACK, None)),
    (half(on_map(7, 7, heads=2, head_dim=128)), (HEADS, None), (HEADS_BACK, None)),
    (half(on_map(20, 20, heads=5, head_dim=64)), (HEADS, None), (HEADS_BACK, None)),
    (half(on_map(20, 20, kernel=(3, 5))), (HEADS, None), (HEADS_BACK, None)),
    (
        on_map(20, 20, p=2.0),
        ("general::attend", "neither bfloat16 nor float16"),
        (GENERAL_BACK, "neither bfloat16 nor float16"),
    ),
    (
        half(on_map(7, 7, heads=2, head_dim=20)),
        ("general::attend_small", "a head dimension that is no multiple of 8 up to 128"),
        (GENERAL_BACK, "a head dimension that is no multiple of 8 up to 128"),
    ),
    (
        half(replace(on_map(20, 20), layout="misaligned")),
        ("general::attend", "rows of a token tensor are not aligned to 16 bytes"),
        (GENERAL_BACK, "rows of a token tensor are not aligned to 16 bytes"),
    ),
    (
        half(on_map(20, 20, heads=1, head_dim=64, kernel=(7, 7))),
        (f"{STATE}, {OUTPUT}", None),
        (HEADS_BACK, None),
    ),
    (half(on_map(8, 10, p=None)), (f"{STATE}, {OUTPUT}", None), (HEADS_BACK, None)),
]

SCRIPT = """
import sys
sys.path[:0] = {path!r}
import torch
from cases import make
from test_choice import CHOICES
for case, *_ in CHOICES:
    call = make(case)
    call.run()
    call.gradients()
"""


@pytest.fixture(scope="module")
def log() -> list[str]:
    """What FLATTEN_LOG=1 writes of each of CHOICES, called without gradients and then with."""
    script = SCRIPT.format(path=[os.path.dirname(__file__), *sys.path])
    env = {**os.environ, "FLATTEN_LOG": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("flatten.attention")]


@pytest.mark.parametrize("index", range(len(CHOICES)), ids=lambda i: str(CHOICES[i][0]))
def test_the_log_tells_the_kernels_and_why(log, index):
    case, forward, backward = CHOICES[index]
    channels = case.heads * case.head_dim
    tokens = case.prefix + case.size[0] * case.size[1]
    windows = case.windows // case.batch
    shape = rf"\({case.batch}, {tokens}, {channels}\), {case.heads} heads, {windows} windows"
    # A call without gradients, one that keeps what the backward pass needs, and that.
    lines = log[3 * index : 3 * index + 3]
    for line, name, (kernels, why) in zip(
        lines, ("attention", "attention", "attention_backward"), (forward, forward, backward), strict=True
    ):
        dtype = str(case.dtype).removeprefix("torch.")
        reason = "" if why is None else f", not on tensor cores: {re.escape(why)}"
        assert re.match(rf"flatten\.{name}: {dtype} {shape}: {re.escape(kernels)}{reason}", line), line
        assert why is not None or line.endswith(kernels)


def test_nothing_is_written_unless_asked(capfd):
    make(on_map(7, 7)).run()
    assert "flatten." not in capfd.readouterr().err
