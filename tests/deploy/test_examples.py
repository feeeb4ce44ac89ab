"""The examples run, and give what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_video(capsys: pytest.CaptureFixture[str]) -> None:
    """Compares itself with the masked formula."""
    runpy.run_path(str(EXAMPLES / "video.py"), run_name="__main__")
    assert capsys.readouterr().out == "equal to the masked formula: (2, 6, 63, 32)\n"


def peaks(side: int) -> list[float]:
    """Gigabytes of each of two processes."""
    command = ["--standalone", "--nproc-per-node", "2", EXAMPLES / "context_parallel.py", "--side", str(side)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # The two write to one pipe: a line may begin before the other's is ended.
    return [float(peak) for peak in re.findall(r"process [01]: .*? peak ([\d.]+) GB", done.stdout)]


def test_context_parallel() -> None:
    assert len(peaks(63)) == 2


@pytest.mark.slow
def test_four_million_tokens_on_two_processes_take_less_than_3_gb_each() -> None:
    found = peaks(2048)
    assert len(found) == 2
    assert max(found) < 3
