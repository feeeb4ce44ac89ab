"""The way out: FLATTEN_CUDA and flatten_ext.cuda_kernels choose the most that a call may use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from cases import (
    TENSOR_CORE_TOLERANCE,
    TENSORS,
    gradients,
    half,
    make,
    on_map,
    oracle_gradients,
    relative_error,
)

import flatten_ext

LEVELS = ["tensorcore", "general", "reference"]
CASES = [
    half(on_map(12, 10, kernel=(5, 5), key_bias=True)),
    half(on_map(8, 8, window=(4, 4), shift=(1, 2), kernel=(3, 3)), torch.float16),
    on_map(9, 7, kernel=(5, 5), key_bias=True),
]


def logged(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = [os.path.dirname(os.path.dirname(__file__)), *sys.path]
    script = f"import sys\nsys.path[:0] = {path!r}\n{script}"
    env = {**os.environ, "FLATTEN_LOG": "1", **environment}
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)


CALL = """
import flatten_ext
from cases import half, make, on_map
call = make(half(on_map(12, 10, kernel=(5, 5))))
call.run(), call.gradients()
"""


@pytest.mark.parametrize("level", LEVELS)
def test_the_variable_chooses(level):
    done = logged(CALL, FLATTEN_CUDA=level)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("flatten.attention")]
    assert len(lines) == (0 if level == "reference" else 3)
    assert all((": tensorcore::" in line) == (level == "tensorcore") for line in lines), lines


def test_a_bad_variable_is_named():
    done = logged(CALL, FLATTEN_CUDA="generel")
    assert 'FLATTEN_CUDA is "generel", expected tensorcore, general or reference' in done.stderr
    done = logged("import flatten_ext\nwith flatten_ext.cuda_kernels('general'): pass", FLATTEN_CUDA="x")
    assert "FLATTEN_CUDA is none of tensorcore, general and reference" in done.stderr


def assert_right(found, expected, dtype):
    for name, value in expected.items():
        error = relative_error(found[name], value)
        assert error <= TENSOR_CORE_TOLERANCE[dtype].gradient, name


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_level_is_right(case, level):
    call = make(case)
    with flatten_ext.cuda_kernels(level):
        found = gradients(torch.ops.flatten.attention, call.arguments, call.grad_out)
    assert_right(found, oracle_gradients(call.arguments, call.grad_out), case.dtype)


def test_one_compilation_serves_all_levels():
    call = make(CASES[0])
    compiled = torch.compile(torch.ops.flatten.attention, backend="aot_eager", fullgraph=True)
    expected = oracle_gradients(call.arguments, call.grad_out)
    for level in LEVELS:
        with flatten_ext.cuda_kernels(level):
            found = gradients(compiled, call.arguments, call.grad_out)
        assert_right(found, expected, call.case.dtype)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("forward", "backward"), [(a, b) for a in LEVELS for b in LEVELS if a != b])
def test_a_backward_may_have_another_level_than_its_forward(forward, backward, compiled):
    call = make(half(on_map(20, 20, batch=1, kernel=(5, 5))))
    expected = oracle_gradients(call.arguments, call.grad_out)
    function = torch.ops.flatten.attention
    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    present = [name for name in TENSORS if name in call.arguments]
    with flatten_ext.cuda_kernels(forward):
        out = function(**call.arguments)
    with flatten_ext.cuda_kernels(backward):
        found = torch.autograd.grad(out, [call.arguments[name] for name in present], call.grad_out)
    assert_right(dict(zip(["out", *present], [out, *found], strict=True)), expected, call.case.dtype)


def test_levels_nest_and_end():
    with flatten_ext.cuda_kernels("reference"):
        with flatten_ext.cuda_kernels("tensorcore"):
            pass
        with pytest.raises(RuntimeError, match="out"), flatten_ext.cuda_kernels("general"):
            raise RuntimeError("out")
        done = flatten_ext._cuda_kernels._set_level()(-1)
    assert done == 0
    assert flatten_ext._cuda_kernels._set_level()(-1) == 2


def test_a_level_that_is_none():
    expected = "most is 'fast', expected one of tensorcore, general, reference"
    with pytest.raises(ValueError, match=expected), flatten_ext.cuda_kernels("fast"):
        pass


# As a driver that grants no kernel more shared memory than the usual 48 KiB.
REFUSE = "int cudaFuncSetAttribute(const void* f, int attribute, int value) { return value > 0; }"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("case", "kernel", "variable"),
    [
        ("half(on_map(12, 12, heads=3, kernel=(5, 5)))", "tensorcore::forward_state<", "general"),
        ("on_map(12, 12, heads=6, kernel=(5, 5))", "general::state_by_head<", "reference"),
        ("on_map(12, 12, heads=1, head_dim=64, kernel=(7, 7))", "general::attend_small<", "reference"),
    ],
)
def test_an_error_of_a_launch_names_kernel_call_and_variable(case, kernel, variable, tmp_path):
    library = tmp_path / "refuse.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), "-x", "c", "-"]
    subprocess.run(command, input=REFUSE, text=True, check=True)
    script = f"from cases import half, make, on_map\nimport flatten_ext\nmake({case}).run()"
    done = logged(script, LD_PRELOAD=f"{library}:{os.environ.get('LD_PRELOAD', '')}")
    assert f"the launch of {kernel}" in done.stderr.replace("flatten::cuda::", ""), done.stderr
    dtype = "bfloat16" if "half" in case else "float32"
    assert f"RuntimeError: flatten.attention: {dtype} (2, 144, " in done.stderr
    assert f"FLATTEN_CUDA={variable} goes on without these kernels" in done.stderr


def test_hardware_without_a_test_is_named_once():
    script = "import torch, flatten_ext\nfrom cases import make, on_map\n" + "make(on_map(5, 5)).run()\n" * 2
    said = logged(script).stderr
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    assert said.count(f"never on a GPU of compute capability {capability}") == 1, said
    assert "flatten-ext check --device cuda" in said
