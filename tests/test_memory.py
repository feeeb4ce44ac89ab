"""A forward allocates its output and little else; measured by the resident memory of a fresh process."""

from __future__ import annotations

import subprocess
import sys

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
