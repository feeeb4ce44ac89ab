"""Commands and virtual environments for the packaging tests."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLDER_TORCH = os.environ.get("FLATTEN_TEST_TORCH", "2.13.0")

# Only the CPU library: that is what these tests run, and CUDA takes much longer to compile.
CPU_ONLY = {"FLATTEN_WITH_CUDA": "0"}
# Where results are computed: compiled in half the time that -O3 takes, and the same code otherwise.
BRISK = {**CPU_ONLY, "CXXFLAGS": "-O1"}
# Where only it is of interest that a build succeeds and loads.
QUICK = {**CPU_ONLY, "CXXFLAGS": "-O0"}


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Runs a command outside the source tree's reach; fails with the end of what it printed."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXXFLAGS", "LDFLAGS")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**inherited, **(env or {})},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}"
    return done.stdout


def install_beside(folder: Path, *packages: str) -> None:
    """Their newest releases, in a folder behind this environment's packages; torch and numpy are ours."""
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *packages, cwd=folder)
    sys.path.append(str(folder))


@dataclass
class Venv:
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def pip_install(self, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
        run(self.python, "-m", "pip", "install", "-q", *arguments, cwd=self.folder, env=env)
