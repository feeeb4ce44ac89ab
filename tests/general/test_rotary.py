"""flatten_ext.rotary_table against the tables of the public code, and the rotation by them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from golden_data import Golden
from published import CORES, size_of

import flatten_ext
from flatten_ext import reference
from flatten_ext.rotary import rotary_table, rotate


def by_hand(size, pairs, closed, base=10000.0):
    """Entry by entry: pair i of n turns by position * base^(-i/n), with a closed end base^(-i/(n-1))."""
    rows = []
    for token in range(math.prod(size)):
        position, rest = [], token
        for length in reversed(size):
            position.insert(0, rest % length)
            rest //= length
        angles = [
            position[axis] * base ** (-i / max(n - 1 if closed else n, 1))
            for axis, n in enumerate(pairs)
            for i in range(n)
        ]
        rows.append([[math.cos(a), math.sin(a)] for a in angles])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "pairs", "closed"),
    [
        pytest.param({"size": (3, 5), "channels": 16}, (4, 4), False, id="all-channels-open"),
        pytest.param({"size": (5, 2), "channels": 16, "heads": 2}, (2, 2), True, id="per-head-closed"),
        pytest.param({"size": (2, 3), "channels": 12, "heads": 3}, (1, 1), True, id="one-pair-an-axis"),
        pytest.param(
            {"size": (4, 4), "channels": 24, "heads": 2, "closed": False}, (3, 3), False, id="per-head-open"
        ),
        pytest.param({"size": (4, 4), "channels": 8, "closed": True}, (2, 2), True, id="all-channels-closed"),
        # SANA-Video, head_dim 112: 2 * (112 // 6) channels turn with the row and as many with the column.
        pytest.param(
            {"size": (2, 3, 4), "channels": 224, "heads": 2, "closed": False}, (20, 18, 18), False, id="video"
        ),
    ],
)
def test_entries(arguments, pairs, closed):
    expected = by_hand(arguments["size"], pairs, closed)
    torch.testing.assert_close(rotary_table(**arguments, dtype=torch.float64), expected, rtol=0, atol=1e-13)
    assert torch.equal(rotary_table(**arguments), rotary_table(**arguments, dtype=torch.float64).float())


def test_base():
    table = rotary_table((4, 6), 16, base=100.0, dtype=torch.float64)
    torch.testing.assert_close(table, by_hand((4, 6), (4, 4), False, base=100.0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", CORES["MLLA"].cases)
def test_mlla_table_and_output(case):
    golden = Golden(case)
    arguments = (size_of(golden), golden.meta["dim"])
    recorded = golden["param.rope.rotations"].flatten(0, 1)  # made in float32
    torch.testing.assert_close(rotary_table(*arguments).double(), recorded, rtol=0, atol=1.1e-6)
    table = rotary_table(*arguments, dtype=torch.float64)
    out = CORES["MLLA"].call(reference, golden, leaves(golden, "MLLA") | {"rotary": table})
    assert difference(out, golden["out.y_t64"]) <= 1e-10


@pytest.mark.parametrize("method", ["RALA", "MALA"])
@pytest.mark.parametrize("number", range(5))
def test_rala_and_mala_tables(method, number):
    golden = Golden(CORES[method].cases[number])
    size, channels, heads = size_of(golden), golden.meta["dim"], golden.meta["heads"]
    table = rotary_table(size, channels, heads)
    angle = golden["param.RoPE.angle"][::2]  # of the pairs of an axis, made in float32
    for axis, part in enumerate(table.double().unflatten(0, size).chunk(2, 2)):
        position = torch.arange(size[axis], dtype=torch.float64)
        position = position[:, None, None] if axis == 0 else position[None, :, None]
        turned = (position * angle).expand(*size, -1)
        torch.testing.assert_close(part[..., 0], turned.cos(), rtol=0, atol=1.1e-6)
        torch.testing.assert_close(part[..., 1], turned.sin(), rtol=0, atol=1.1e-6)


@pytest.mark.parametrize("method", ["RALA", "MALA"])
@pytest.mark.parametrize("number", range(5))
def test_rala_and_mala_outputs_with_our_table(method, number):
    golden = Golden(CORES[method].cases[number])
    table = rotary_table(size_of(golden), golden.meta["dim"], golden.meta["heads"], dtype=torch.float64)
    core = CORES[method].call(reference, golden, leaves(golden, method) | {"rotary": table})
    out = F.conv2d(core, golden["param.m.proj.weight"], golden["param.m.proj.bias"])
    assert difference(out, golden["out.y_t64"]) <= 1e-10


def leaves(golden, method):
    return {key: golden[key] for key in CORES[method].reads(golden)}


def difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_prefix_tokens_are_not_rotated():
    table = rotary_table((2, 3), 8, num_prefix_tokens=2)
    assert table.shape == (8, 4, 2)
    assert torch.equal(table[:2], torch.tensor([1.0, 0.0]).expand(2, 4, 2))
    assert torch.equal(table[2:], rotary_table((2, 3), 8))


def test_the_package_exports_it():
    assert flatten_ext.rotary_table is rotary_table
    assert flatten_ext.rotary_table((56, 56), channels=64).shape == (3136, 32, 2)
    assert flatten_ext.rotary_table((40, 72), channels=128, heads=2).shape == (2880, 32, 2)


def test_angles_of_half_precision_would_be_wrong():
    """Why dtype is float32 at least: public modules under .bfloat16() keep angles and sines in it."""
    theta = 10000.0 ** -(torch.arange(16, dtype=torch.float64) / 15)
    coarse = (torch.arange(56, dtype=torch.bfloat16)[:, None] * theta.bfloat16()).sin()
    exact = (torch.arange(56, dtype=torch.float64)[:, None] * theta).sin()
    assert (coarse - exact).abs().max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (4,), "channels": 8}, r"size must be \(H, W\) or \(T, H, W\).*\(4,\)"),
        ({"size": (4, 0), "channels": 8}, r"size must be.*\(4, 0\)"),
        ({"size": (4, 4), "channels": 6}, "channels must be a multiple of 4 .* but it is 6"),
        ({"size": (4, 4), "channels": 0}, "channels must be a multiple of 4 .* but it is 0"),
        (
            {"size": (4, 4), "channels": 12, "heads": 2},
            "channels / heads must be a multiple of 4 .* but it is 6",
        ),
        ({"size": (2, 4, 4), "channels": 4}, "channels must be even and at least 6 .* but it is 4"),
        ({"size": (4, 4), "channels": 8, "heads": 3}, "heads must divide channels = 8, but it is 3"),
        ({"size": (4, 4), "channels": 8, "heads": 0}, "heads must divide channels = 8, but it is 0"),
        ({"size": (4, 4), "channels": 8, "base": 0.0}, "base must be greater than 0, but it is 0.0"),
        ({"size": (4, 4), "channels": 8, "base": math.nan}, "base must be greater than 0, but it is nan"),
        ({"size": (4, 4), "channels": 8, "num_prefix_tokens": -1}, "num_prefix_tokens must be at least 0"),
        (
            {"size": (4, 4), "channels": 8, "dtype": torch.bfloat16},
            "dtype must be torch.float32 or torch.float64",
        ),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        rotary_table(**arguments)


@pytest.mark.parametrize("heads", [None, 2])
def test_products_of_rotated_tokens_depend_on_their_distance(heads):
    """What rotation is for: (R_i q) . (R_j k) is the same at all pairs of places with the same offset."""
    table = rotary_table((5, 4), 16, heads, dtype=torch.float64)
    q, k = (torch.randn(16, dtype=torch.float64).expand(20, 16) for _ in range(2))
    q, k = (rotate(x, table, heads or 1).unflatten(0, (5, 4)) for x in (q, k))
    product = (q[2:, :3] * k[:3, 1:]).sum(-1)  # two rows down, one column to the left
    torch.testing.assert_close(product, product[:1, :1].expand(3, 3), rtol=0, atol=1e-12)
    assert (q[0, 0] * k).sum(-1).std() > 0.1


def test_a_table_with_a_gradient_is_refused():
    table = rotary_table((2, 2), 4).requires_grad_()
    with pytest.raises(ValueError, match="rotary is a table and has no gradient"):
        rotate(torch.randn(4, 4), table)
