"""`run`: a script or module sees what Python gives it, and our models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")

from flatten_ext.tools import cli

PROGRAM = """
import json, sys, timm
import beside
if __name__ == "__main__":
    model = timm.create_model(sys.argv[1], num_classes=7)
    print(json.dumps([sys.argv, sys.path[0], beside.VALUE, model.num_classes, __file__]))
    sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for folder in ("scripts", "package"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "program.py").write_text(PROGRAM)
    (tmp_path / "scripts" / "beside.py").write_text("VALUE = 'of the script'")
    (tmp_path / "beside.py").write_text("VALUE = 'of the working folder'")
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "broken.py").write_text("raise OSError('its own')")
    return tmp_path


def run(place: Path, *arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(',')))"
    code += "; from flatten_ext.__main__ import main; main()"
    command = [sys.executable, "-c", code, without or "nothing", "run", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)


def test_a_script_sees_our_models_and_its_own_arguments(place: Path) -> None:
    done = run(
        place, "scripts/program.py", "flatten_deit_tiny", "3", "--help", "-m", "x", without="typer,rich"
    )
    assert done.returncode == 3, done.stderr
    arguments, path, beside, classes, file = json.loads(done.stdout)
    assert arguments == ["scripts/program.py", "flatten_deit_tiny", "3", "--help", "-m", "x"]
    assert (Path(path), beside, classes) == ((place / "scripts").resolve(), "of the script", 7)
    assert file == "scripts/program.py"


def test_a_module_too(place: Path) -> None:
    done = run(place, "-m", "package.program", "flatten_pvt_v2_b0", "0", "--help")
    assert done.returncode == 0, done.stderr
    arguments, path, beside, classes, file = json.loads(done.stdout)
    assert arguments == [file, "flatten_pvt_v2_b0", "0", "--help"]
    assert (Path(path), beside, classes) == (place.resolve(), "of the working folder", 7)


def test_as_python_runs_it(place: Path) -> None:
    """`python -m flatten_ext run ...`, from anywhere."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "flatten_ext", "run", "scripts/program.py", "flatten_deit_tiny", "0"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[2] == "of the script"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), r"expected \[--onnx\] SCRIPT"),
        (("--onnx",), r"expected \[--onnx\] SCRIPT"),
        (("-m",), r"expected \[--onnx\] SCRIPT"),
        (("nowhere.py",), "script nowhere.py does not exist"),
        (("-m", "nowhere.at_all"), "module nowhere.at_all"),
        (("-m", "nowhere"), "module nowhere is not installed"),
    ],
)
def test_a_program_that_is_not_there_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], named: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match=rf"^flatten-ext run: .*{named}") as caught:
        cli.main(["run", *arguments])
    assert "\n" not in str(caught.value)


def test_a_programs_own_error_keeps_its_traceback(place: Path) -> None:
    done = run(place, "broken.py")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "OSError: its own" in done.stderr


def test_without_timm_it_says_what_to_install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SystemExit, match=r"flatten-ext run: .*pip install 'flatten-ext\[models\]'"):
        cli.main(["run", str(place / "broken.py")])
