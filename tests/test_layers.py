"""How the house is built: what imports or includes what, in no circle and no way back up; no long file."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, CSRC = ROOT / "flatten_ext", ROOT / "csrc"
Graph = dict[str, set[str]]


def python_name(path: Path) -> str:
    """flatten_ext/models/swin.py -> flatten_ext.models.swin"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def python_imports() -> Graph:
    """Of every module of the package, inside functions too; what only type checkers read is left out."""
    files = {python_name(path): path for path in PACKAGE.rglob("*.py")}

    def imported(name: str, path: Path) -> set[str]:
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        nodes, found = [ast.parse(path.read_text())], set()
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*(parents if node.level else []), *([node.module] if node.module else [])])
                submodules = {f"{base}.{alias.name}" for alias in node.names}
                found |= submodules & set(files) or {base}
            nodes += ast.iter_child_nodes(node)
        return found & set(files) - {name}

    return {name: imported(name, path) for name, path in files.items()}


def includes() -> Graph:
    """Of every file of csrc, by paths below it."""
    files = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu")]
    quoted = re.compile(r'^#include "([^"]+)"', re.M)
    return {
        str(path.relative_to(CSRC)): {
            str((path.parent / name).resolve().relative_to(CSRC)) for name in quoted.findall(path.read_text())
        }
        for path in files
    }


def circles(graph: Graph) -> list[list[str]]:
    """Ways along the arrows that end where they began."""
    done: set[str] = set()
    found = []

    def walk(node: str, way: list[str]) -> None:
        if node in way:
            found.append([*way[way.index(node) :], node])
        elif node not in done:
            for following in sorted(graph.get(node, ())):
                walk(following, [*way, node])
            done.add(node)

    for node in sorted(graph):
        walk(node, [])
    return found


@pytest.mark.parametrize("graph_of", [python_imports, includes])
def test_nothing_leads_back_to_itself(graph_of: Callable[[], Graph]) -> None:
    graph = graph_of()
    assert sum(map(len, graph.values())) > 50  # they were found
    assert circles(graph) == []


# Floors from the ground up: a file may reach to its own and to those before it. A folder stands for all that
# is in it and not named itself.
PYTHON_FLOORS = (
    ("flatten_ext._load", "flatten_ext.errors", "flatten_ext.extras", "flatten_ext.output"),
    ("flatten_ext.rotary", "flatten_ext.reference"),
    ("flatten_ext._torch",),
    ("flatten_ext.ops",),
    ("flatten_ext._grids", "flatten_ext._layers", "flatten_ext._local", "flatten_ext.distributed"),
    ("flatten_ext._focused",),
    ("flatten_ext.nn",),
    ("flatten_ext",),  # and what is not named here
    ("flatten_ext.models",),
    ("flatten_ext.tools", "flatten_ext.__main__"),
)
CSRC_FLOORS = (
    ("params.h", "export.h", "torch_errors.h"),
    ("cpu/vec", "cpu/workspace.h", "cpu/kernels.h", "cpu/isa.h", "cpu/large_pages.h"),
    ("cpu/kernels",),
    ("cpu/isa",),
    ("dtypes.h", "show.h", "arguments.h", "states.h", "checker.h", "outputs.h", "plain_torch.h"),
    ("operators.h",),
    (
        *("cuda/launch.h", "cuda/launch_error.h", "cuda/workspace.h", "cuda/enqueue.cuh", "cuda/choose.h"),
        "cuda/relu.cuh",
    ),
    ("cuda/general",),
    ("cuda/tensorcore",),
    ("",),
)


def floor(name: str, floors: tuple[tuple[str, ...], ...], separator: str) -> int:
    """Of the longest name in `floors` that is `name` or a folder around it."""
    best = max(
        (
            entry
            for level in floors
            for entry in level
            if f"{name}{separator}".startswith(f"{entry}{separator}" * bool(entry))
        ),
        key=len,
    )
    return next(number for number, level in enumerate(floors) if best in level)


@pytest.mark.parametrize(
    ("graph_of", "floors", "separator"),
    [(python_imports, PYTHON_FLOORS, "."), (includes, CSRC_FLOORS, "/")],
)
def test_no_arrow_leads_up(graph_of, floors, separator) -> None:
    """Tools stand on the library, models on the operators, and kernels on params.h."""
    graph = graph_of()
    up = [
        (name, other)
        for name, others in graph.items()
        for other in others
        if floor(other, floors, separator) > floor(name, floors, separator)
    ]
    assert up == []


def test_no_file_is_long() -> None:
    kinds = (".py", ".cpp", ".h", ".cuh", ".cu", ".sh")
    folders = ("benchmarks", "csrc", "docs", "flatten_ext", "include", "tests")
    files = [path for name in folders for path in (ROOT / name).rglob("*") if path.suffix in kinds]
    assert len(files) > 200
    long = {
        str(path.relative_to(ROOT)): lines for path in files if (lines := path.read_text().count("\n")) > 450
    }
    assert long == {}
