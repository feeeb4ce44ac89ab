"""The borders of what fits a launch: many windows, wide strides, many tokens, several host threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import TOLERANCE, Call, assert_close, half, make, on_map
from test_oracle import BF16, check

from flatten_ext import reference

# A pause after each change of a kernel's attributes, so that host threads meet where they can do harm.
PAUSE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  int (*real)(const void*, int, int) = dlsym(RTLD_NEXT, "cudaFuncSetAttribute");
  int error = real(function, attribute, value);
  usleep(2000);
  return error;
}
"""

THREADS = """
import sys, threading
sys.path[:0] = {path!r}
import torch
from cases import half, make, on_map

# Their kernels are the same, in whole maps and in small windows; the shared memory they ask for is not.
cases = [half(on_map(12, 12, batch=1, heads=heads, kernel=(5, 5), **more))
         for heads in (3, 6) for more in ({{}}, {{"window": (6, 6)}})]
cases += [on_map(9, 9, batch=1, heads=1, head_dim=d, kernel=(7, 7)) for d in (32, 64)]
calls = [make(case) for case in cases]
start, failures = threading.Barrier(len(calls)), []

def repeat(call):
    start.wait()
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                call.run()
                call.gradients()
            torch.cuda.synchronize()
    except BaseException as error:
        failures.append(f"{{call.case}}: {{error}}")

threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures
print("done")
"""


def test_host_threads_do_not_disturb_each_other(tmp_path):
    """The limit of dynamic shared memory belongs to a kernel, not to a launch."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    pause = tmp_path / "pause.so"
    command = ["cc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(pause), "-ldl"]
    subprocess.run(command, input=PAUSE, text=True, check=True)
    env = {**os.environ, "LD_PRELOAD": f"{pause}:{os.environ.get('LD_PRELOAD', '')}"}
    script = THREADS.format(path=sys.path)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("done\n")


def test_more_windows_than_a_grid_has_rows():
    """65535 blocks are the most of a grid in y and z: windows are counted in x, or some images at a time."""
    few, windows = 37, 2
    times = 65536 // (few * windows) + 1
    small = make(half(on_map(4, 4 * windows, batch=few, heads=1, window=(4, 4))))
    names = ["q", "k", "v"]
    many = {n: small.arguments[n].detach().repeat(times, 1, 1).requires_grad_() for n in names}
    assert many["q"].shape[0] * windows > 65535
    large = Call(replace(small.case, batch=few * times), {**small.arguments, **many}, small.grad_out)
    out = large.run()
    assert torch.equal(out, small.run().repeat(times, 1, 1))
    scale = small.arguments["scale"]
    got = torch.autograd.grad(out, [*many.values(), scale], small.grad_out.repeat(times, 1, 1))
    want = small.gradients()
    for name, gradient in zip(names, got[:3], strict=True):
        assert torch.equal(gradient, want[name].repeat(times, 1, 1)), name
    assert_close(got[3] / times, want["scale"], 1e-3, "gradient of scale")


def test_a_token_stride_of_two_gibibytes():
    """Its bytes do not fit 31 bits: the general kernels take the call."""
    call = make(half(on_map(1, 2, batch=1, heads=1, kernel=(3, 3))), requires_grad=False)
    memory = torch.empty(2**30 + 64, dtype=BF16, device="cuda")
    far = memory.as_strided((1, 2, 32), (0, 2**30, 1))
    far.copy_(call.arguments["q"])
    strided = Call(call.case, {**call.arguments, "q": far}, call.grad_out)
    assert_close(strided.run(), call.oracle().run(reference), TOLERANCE[BF16].out, "out")


@pytest.mark.parametrize("argument", ["q", "k"])
def test_more_tokens_than_32_bits_count(argument):
    call = make(half(on_map(1, 2, batch=1, heads=1)), requires_grad=False)
    q, k, v = call.tensors[:3]
    many = q[:, :1].expand(1, 2**31, 32)
    q, k, v = (many, k, v) if argument == "q" else (q, many, many)
    message = rf"flatten.attention: {argument} has shape \(1, 2147483648, 32\), expected at most 2147483647"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.flatten.attention(q, k, v, 1)


# What a block of 64 KiB of shared memory (compute capability 7.5) holds by a hair or not at all.
@pytest.mark.parametrize(
    "case",
    [
        on_map(3, 17, batch=1, heads=32, head_dim=32, kernel=(7, 7), key_bias=True),
        on_map(3, 17, batch=1, heads=1, head_dim=1024, kernel=(7, 7)),
        on_map(3, 17, batch=1, heads=31, head_dim=33, kernel=(7, 7), p=2.5),
        half(on_map(3, 17, batch=1, heads=32, head_dim=32, kernel=(7, 7))),
        on_map(5, 7, batch=1, heads=16, head_dim=32, kernel=(3, 3), key_bias=True, dtype=torch.float64),
        on_map(5, 7, batch=1, heads=8, head_dim=130, kernel=(3, 3), dtype=torch.float64),
        on_map(5, 7, batch=1, heads=2, head_dim=256, dtype=torch.float64),
        on_map(2, 3, batch=1, heads=1, head_dim=480, dtype=torch.float64),
        on_map(2, 3, batch=1, heads=1, head_dim=481, dtype=torch.float64),  # by plain torch
    ],
    ids=str,
)
def test_shared_memory_of_the_least_device(case):
    check(case)
