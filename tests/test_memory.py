"""A forward allocates its output and little else; measured by the resident memory of a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import resource, torch, flatten_ext
from flatten_ext import attention

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
dtype, side, window = torch.{dtype}, {side}, {window}
q, k, v = (torch.ones(1, side * side, 64, dtype=dtype) for _ in range(3))
weight, scale = torch.ones(32, 1, 5, 5), torch.ones(64)
key_bias = torch.ones(side * side if window is None else window[0] * window[1], 64)
grad_out = torch.ones_like(q)
state = torch.empty(0)
small = [t[:, :256] for t in (q, k, v)]
attention(*small, 2, scale, key_bias[:256].contiguous() if window is None else None, weight, None, [16, 16])
before = peak()
out = attention(q, k, v, 2, scale, key_bias, weight, None, [side, side], window)
forward = peak() - before - out.nbytes
before = peak()
gradients = torch.ops.flatten.attention_backward(
    grad_out, q, k, v, 2, scale, key_bias, weight, None, [side, side], window, None, 3.0, 1e-6, state,
    [True, True, True, True, False, True, False],
)
backward = peak() - before - sum(g.nbytes for g in gradients)
print(forward, backward, q.nbytes)
"""


@pytest.mark.parametrize("window", [None, [16, 16]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_of_the_size_of_the_tokens_is_allocated(dtype, window):
    code = MEASURE.format(dtype=dtype, side=512, window=window)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    forward, backward, tokens = map(int, done.stdout.split())
    assert tokens >= 32 * 2**20
    assert forward <= 2**20, f"{forward} bytes beside the output"
    assert backward <= 3 * 2**20, f"{backward} bytes beside the gradients"


FLAGS = """
import re, torch
from pathlib import Path
from flatten_ext import linear_attention

def large_pages(t):  # whether the mapping that holds the middle of t asks for them (proc(5), VmFlags)
    address, inside = t.data_ptr() + t.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()

q = torch.ones(1, 1, 64).expand(1, 3 << 16, 64)  # 48 MiB, but as one row
ordinary = torch.empty(q.shape)
print(large_pages(ordinary), large_pages(linear_attention(q, q, q, 1)))
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists() or not Path("/proc/self/smaps").exists(),
    reason="this system has no transparent huge pages to ask for",
)
def test_large_outputs_ask_for_large_pages():
    done = subprocess.run([sys.executable, "-c", FLAGS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
