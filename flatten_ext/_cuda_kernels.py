"""Which of the CUDA kernels a call may use."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from . import _load

__all__ = ["cuda_kernels"]

LEVELS = ("reference", "general", "tensorcore")  # the order of csrc/cuda/level.h


@functools.cache
def _set_level():
    """The library's function that sets the level and returns the one before."""
    function = ctypes.CDLL(str(_load.LIBRARIES / "libflatten_cuda.so")).flatten_cuda_level
    function.argtypes, function.restype = [ctypes.c_int], ctypes.c_int
    return function


@contextmanager
def cuda_kernels(most: Literal["tensorcore", "general", "reference"]) -> Iterator[None]:
    """The most that calls on CUDA may use while the context is open: the way out where kernels are wrong.

    It holds for all threads of the process, as autograd runs backward passes in threads of its own, and for
    compiled models, which are not compiled anew. A forward and its backward need not have the same level.
    CUDA graphs keep the kernels that they were captured with. The environment variable `FLATTEN_CUDA` sets
    the level when the process starts. Where a build has no CUDA kernels, calls run in plain torch anyway.

    Args:
        most: "tensorcore" (everything, the default), "general" (no tensor-core kernels) or "reference" (no
            kernels: the formula in plain torch, which is slower and takes more memory).

    Raises:
        ValueError: `most` is none of them, or FLATTEN_CUDA is not.

    Example:
        >>> with flatten_ext.cuda_kernels("general"):
        ...     loss = model(x).sum()
        ...     loss.backward()
    """
    if most not in LEVELS:
        raise ValueError(f"most is {most!r}, expected one of {', '.join(reversed(LEVELS))}")
    if _load.cuda_unavailable_reason is not None:
        yield
        return
    if _set_level()(-1) < 0:
        raise ValueError("FLATTEN_CUDA is none of tensorcore, general and reference")
    before = _set_level()(LEVELS.index(most))
    try:
        yield
    finally:
        _set_level()(before)
