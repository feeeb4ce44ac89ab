"""Other programs with our models registered: `python SCRIPT` and `python -m MODULE` behind one import."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flatten_ext.errors import InputError, blamed_on
from flatten_ext.extras import require

__all__ = ["program"]


def program(arguments: Sequence[str]) -> Callable[[], None]:
    """What runs a script, or with "-m" a module, as Python itself does, after `import flatten_ext.models`.

    Args:
        arguments: [SCRIPT, ...] or ["-m", MODULE, ...]; the rest is the program's own. With "--onnx" before
            them torch's ONNX exporter knows the operators too (`flatten_ext.onnx.register`).

    Raises:
        InputError: no program is named, or there is none of that name.
        MissingExtra: timm is not installed, or onnx and onnxscript are not and "--onnx" asks for them.
    """
    arguments = list(arguments)
    with_onnx = arguments[:1] == ["--onnx"]
    arguments = arguments[with_onnx:]
    as_module = arguments[:1] == ["-m"]
    name, *rest = arguments[as_module:] or [""]
    if not name:
        raise InputError("expected [--onnx] SCRIPT [ARGUMENTS] or [--onnx] -m MODULE [ARGUMENTS]")
    if as_module:
        # As `python -m`: modules of the working folder first.
        sys.path[0] = os.getcwd()
        with blamed_on(f"module {name}"):
            found = importlib.util.find_spec(name)
        if found is None:
            raise InputError(f"module {name} is not installed, and not in {os.getcwd()}")
    elif not Path(name).exists():
        raise InputError(f"script {name} does not exist (a module is run by -m {name})")
    require("timm", "models", "the models")
    require("flatten_ext.models", "models", "the models")  # registers them with timm
    if with_onnx:
        require("flatten_ext.onnx", "onnx", "export to ONNX").register()

    def start() -> None:
        sys.argv = [name, *rest]
        if as_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
            return
        # A folder or zip file with __main__.py goes on the path itself, which runpy sees to.
        if Path(name).is_file():
            sys.path[0] = str(Path(name).resolve().parent)
        runpy.run_path(name, run_name="__main__")

    return start
