"""The command line: what it prints, writes and answers when something is missing."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from setuptools import find_packages

import flatten_ext
from flatten_ext import _moved, extras, info
from flatten_ext.output import replacing, write_json
from flatten_ext.tools import cli


def run(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """`python -m flatten_ext ...` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "flatten_ext", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


# Runs the command line with the named packages made unimportable.
WITHOUT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from flatten_ext.tools.cli import main
main()
"""


def run_without(packages: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, packages, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_info_names_what_a_bug_report_needs():
    text = run("info").stdout
    for fact in (
        flatten_ext.__version__,
        torch.__version__,
        "libflatten",
        "CUDA kernels",
        "other devices",
        "plain-torch reference",
        "instruction set",
        "threads",
    ):
        assert fact in text
    facts = json.loads(run("info", "--json").stdout)
    assert list(facts) == list(info.installation())


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize("variable", ["FLATTEN_CPU_ISA", "FLATTEN_CPU_STREAM_FROM"])
def test_info_shows_settings_and_a_bad_one(variable, form, monkeypatch):
    """No operator can run then: status 1, and why in the first line and the last."""
    monkeypatch.setenv(variable, "abacus")
    if variable == "FLATTEN_CPU_STREAM_FROM" and info.machine()["cpu_isa"] != "avx512":
        pytest.skip("read by kernels that fill lines of the caches")
    done = run("info", *form, expect=1)
    assert f"{variable}=abacus" in done.stdout
    assert "PROBLEM" in done.stdout
    if variable == "FLATTEN_CPU_ISA" and not form:
        assert "abacus" in done.stdout.split("instruction set")[1].splitlines()[0]
    assert done.stderr.startswith(f'flatten-ext: flatten: {variable} is "abacus", expected')
    assert done.stderr.count("\n") == 1


def test_info_needs_torch_alone():
    done = run_without("typer,rich,numpy,timm,matplotlib,mlxtend", "info")
    assert done.returncode == 0, done.stderr
    assert "instruction set" in done.stdout


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("typer", ["demo"], "cli"),
        ("rich", ["demo"], "cli"),
        ("matplotlib", ["demo"], "demo"),
        ("mlxtend", ["demo"], "demo"),
    ],
)
def test_a_missing_extra_is_one_line_that_says_what_to_install(missing, arguments, extra):
    done = run_without(missing, *arguments)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert missing in done.stderr
    assert f"pip install 'flatten-ext[{extra}]'" in done.stderr


def test_the_demo_needs_no_more_than_its_extra(tmp_path):
    beyond = "timm,torchvision,sklearn,pandas,linformer,performer_pytorch"
    done = run_without(beyond, "demo", "--epochs", "1", "--train-images", "64", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo.png").exists()


def test_help_lists_every_command():
    text = run("--help").stdout
    for module in Path(cli.__file__).parent.joinpath("commands").glob("[a-z]*.py"):
        assert module.stem in text


def test_every_folder_of_modules_is_installed():
    folder = Path(flatten_ext.__file__).parent
    installed = {"flatten_ext", *(f"flatten_ext.{name}" for name in find_packages(str(folder)))}
    for path in folder.rglob("*.py"):
        assert ".".join(("flatten_ext", *path.parent.relative_to(folder).parts)) in installed, path


def test_require_lets_other_import_errors_through(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import a_module_that_is_nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_nowhere"):
        extras.require("broken_package", "demo", "the test")
    with pytest.raises(extras.MissingExtra, match=r"absent_package.*flatten-ext\[demo\]"):
        extras.require("absent_package.part", "demo", "the test")


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:flatten_ext.* has moved")
def test_an_old_module_path_is_the_new_module_and_warns():
    for old in (*_moved.MOVED, "bench.timing", "demo.run", "commands.info"):
        name = f"flatten_ext.{old}"
        new = _moved.new_path(name)
        for imported in (name, "flatten_ext.bench", "flatten_ext.demo", "flatten_ext.commands"):
            sys.modules.pop(imported, None)  # an earlier test's import warned already
        with pytest.warns(DeprecationWarning, match=rf"{name} has moved to {new};".replace(".", r"\.")):
            module = importlib.import_module(name)
        real = importlib.import_module(new)
        for public in getattr(real, "__all__", []):
            assert getattr(module, public) is getattr(real, public)


@pytest.mark.filterwarnings("ignore:flatten_ext.visualize has moved")
def test_names_of_an_old_module_path_are_those_of_the_new():
    from flatten_ext import visualize as old

    assert old.attention_map is flatten_ext.attention_map
    with pytest.raises(AttributeError, match="nothing"):
        old.nothing  # noqa: B018


def test_the_library_does_not_import_the_tools_nor_the_benchmarks_the_demo():
    folder = Path(flatten_ext.__file__).parent
    for path in folder.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = ("flatten_ext", *path.relative_to(folder).parts)[: -node.level] if node.level else ()
                module = ".".join((*base, *filter(None, [node.module])))
                names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        inside = path.relative_to(folder).parts
        if inside[0] not in ("tools", "__main__.py"):
            assert not {name for name in names if name.startswith("flatten_ext.tools")}, path
        if inside[:2] == ("tools", "bench"):
            assert not {name for name in names if name.startswith("flatten_ext.tools.demo")}, path
