"""Measurements in a process of their own, since what malloc kept from earlier calls decides large ones.

glibc maps blocks above 32 MiB afresh from the system for every call and gives the end of its heap back when
64 MiB of it are free; the system then zeroes the pages again. That is as much a part of a call's time as its
arithmetic, but none of the operator's, and two threads do not share it evenly. In the environment `KEPT`
malloc gives nothing back. Another malloc ignores those settings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["KEPT", "in_process"]

# glibc reads these when a process starts: every block comes from the heap, and the heap gives nothing back.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def in_process(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> Any:
    """What a function of a module beside this one returns in a new process; arguments and result are JSON."""
    module = function.__module__
    call = f"{module}.{function.__name__}(*json.loads(sys.argv[1]))"
    code = f"import json, sys, {module}; print(json.dumps({call}))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})},
    )
    return json.loads(done.stdout)
