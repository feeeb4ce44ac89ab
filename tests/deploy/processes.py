"""Runs a test's own file in several processes, which meet through a file and talk through gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist


def run_processes(file: str, count: int, folder: Path, *arguments: str) -> list[str]:
    """Each process's output; all must end well. `file` ends in `if __name__ == "__main__": process(main)`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, file, str(rank), str(count), str(folder / "meeting"), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=500)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(outputs)
    return outputs


def process(main: Callable[..., None]) -> None:
    """What one of them does: joins the group and calls main(rank, count, *arguments)."""
    rank, count, meeting, *arguments = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(count))
    main(int(rank), int(count), *arguments)
    dist.destroy_process_group()
