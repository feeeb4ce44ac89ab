#!/usr/bin/env python3
"""Writes csrc/cuda/units/: for each line of units.txt a small file that instantiates the templates it names.

    python csrc/cuda/make_units.py

setup.py and CMakeLists.txt run it; it needs Python alone and writes only what has changed. The units are in
git all the same, so that tools find them in a checkout never built; tests/test_cuda_build.py compares
them with the table.
"""

from __future__ import annotations

from pathlib import Path
from string import Template

HERE = Path(__file__).resolve().parent
TYPES = {
    "bf16": "__nv_bfloat16",
    "fp16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float16": "__half",
    "float32": "float",
    "float64": "double",
}
DTYPES = {"bf16": "Dtype::kBFloat16", "fp16": "Dtype::kFloat16"}
MODES = {"cubic": "3", "power": "kRuntimeMode"}

# What the host code asks for, and the kernels that it gets.
TENSOR_CORE = {
    "forward": ("ForwardKernels& forward_kernels<$dtype, $dim, $mode>", "Forward<$type, $dim, $mode>"),
    "forward_window": (
        "WindowKernels& window_kernels<$dtype, $dim, $mode>",
        "WindowLaunch<$type, $dim, $mode>",
    ),
    "backward": ("BackwardKernels& backward_kernels<$dtype, $dim>", "Backward<$type, $dim>"),
    "backward_window": (
        "WindowGradientKernels& window_gradient_kernels<$dtype, $dim>",
        "BackwardWindow<$type, $dim>",
    ),
    "heads": ("heads::Kernels& heads::kernels<$dtype, $dim>", "heads::Launches<$type, $dim>"),
    "backward_window_wide": (
        "WindowGradientKernels& window_gradient_kernels<$dtype, $dim, kWideThreads>",
        "BackwardWindow<$type, $dim, kWideThreads>",
    ),
}

# The launches to instantiate, and what each takes beside the stream.
GENERAL = {
    "general_by_head_forward": [
        ("launch_head_state<$type>", "HeadForward"),
        ("launch_head_output<$type>", "HeadForward"),
    ],
    "general_by_head_backward": [("launch_head_backward<$type>", "HeadBackward")],
    "general_forward": [("launch_forward<$type>", "ForwardCall")],
    "general_small": [("launch_small<$type>", "ForwardCall")],
    "general_backward": [("launch_backward<$type>", "BackwardCall")],
    "general_backward_key": [("launch_key_gradient<$type>", "BackwardCall")],
    "general_conv": [
        ("launch_conv<$type>", "ConvCall"),
        ("launch_taps<$type>", "TapsCall"),
        ("launch_parameters<$type>", "ParameterCall"),
    ],
}
# A line that ends in "rare" compiles these beside the unit of the same name without, which leaves them out.
RARE = [("launch_key_taps<$type, 7>", "BackwardCall"), ("launch_key_taps<$type, kAnyTaps>", "BackwardCall")]


def instantiations(of: list[tuple[str, str]], prefix: str = "template") -> list[str]:
    return [f"{prefix} cudaError_t {function}(const {call}&, cudaStream_t);" for function, call in of]


def unit(line: str, table: list[str]) -> str:
    """The text of one unit: KIND ELEMENT [dHEAD_DIM] [MODE], or KIND ELEMENT [rare]."""
    kind, element, *more = line.split()
    values = {"type": TYPES[element]}
    if kind in GENERAL:
        room = header = "general"
        if more == ["rare"]:
            lines = instantiations(RARE)
        else:
            elsewhere = RARE if f"{line} rare" in table else []
            lines = instantiations(elsewhere, "extern template") + instantiations(GENERAL[kind])
    else:
        room = "tensorcore"
        header = "tensorcore/heads" if kind == "heads" else room
        function, kernels = TENSOR_CORE[kind]
        values |= {"dtype": DTYPES[element], "dim": more[0].removeprefix("d")}
        if more[1:]:
            values["mode"] = MODES[more[1]]
        lines = ["template <>", f"const {function}() {{", f"  return {kernels}::kKernels;", "}"]
    return Template(
        "// Made by make_units.py from units.txt.\n"
        f'#include "../{header}/launch.cuh"\n\n'
        f"namespace flatten::cuda::{room} {{\n"
        + "".join(f"{text}\n" for text in lines)
        + f"}}  // namespace flatten::cuda::{room}\n"
    ).substitute(values)


def units() -> dict[str, str]:
    """Every unit's file name and text."""
    lines = (HERE / "units.txt").read_text().splitlines()
    table = [" ".join(words) for line in lines if (words := line.partition("#")[0].split())]
    return {"_".join(line.split()) + ".cu": unit(line, table) for line in table}


def write() -> None:
    folder, wanted = HERE / "units", units()
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.cu"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    write()
