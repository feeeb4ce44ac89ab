"""The private names of torch: in one file, and each can be missing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flatten_ext

PACKAGE = Path(flatten_ext.__file__).parent
HERE = Path(__file__).parent


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def private_names(path: Path) -> set[str]:
    """torch._x.y and `from torch._x import y`, as they are written."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("torch.")]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        found |= {n for n in names if n.startswith("torch.") and any(p[0] == "_" for p in n.split("."))}
        found |= {n for n in names if n.endswith(("._schema", "._handle"))}
    return {n for n in found if not n.split(".")[-1].startswith("__")}


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((PACKAGE / "_torch").glob("*.py")) if p.stem != "private"]
    + [PACKAGE / f"{name}.py" for name in ("__init__", "_load", "info", "nn", "ops", "reference")],
    ids=lambda path: path.name,
)
def test_they_are_in_one_file(path):
    assert private_names(path) == set()


def test_the_one_file_has_them():
    assert "torch._C._AutoDispatchBelowAutograd" in private_names(PACKAGE / "_torch" / "private.py")


def test_the_hooks_work_by_the_public_names():
    done = python(
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/test_hooks.py",
        FLATTEN_PUBLIC_AUTOGRAD="1",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


# What each name may be missing without: everything but what its line in private.py tells.
TRAINS = """
q, k, v = (torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
call = lambda q, k, v: flatten_ext.attention(q, k, v, 2)
assert torch.autograd.gradcheck(call, (q, k, v))
assert torch.autograd.gradgradcheck(call, (q, k, v))
with torch.no_grad():
    assert call(q, k, v).shape == q.shape
with torch.autograd.forward_ad.dual_level():
    dual = torch.autograd.forward_ad.make_dual(v, v)
    found = torch.autograd.forward_ad.unpack_dual(call(q, k, dual)).tangent
    torch.testing.assert_close(found, call(q, k, v))
with torch.autocast("cpu", torch.bfloat16):
    assert call(*(t.detach().float() for t in (q, k, v))).dtype == torch.bfloat16
"""
TORCH_FUNC = "torch.func.grad(lambda q: call(q, k.detach(), v.detach()).sum())(q.detach())"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("torch._C", "_after_autograd_keyset"),
        ("torch._C", "_any_requires_grad"),
        ("torch._C", "_are_functorch_transforms_active"),
        ("torch._C", "_ForceDispatchKeyGuard"),
        ("torch._C", "_ExcludeDispatchKeyGuard"),
        ("torch.autograd.function", "_SingleLevelFunction"),
        ("torch._functorch.utils", "enable_single_level_autograd_function"),
        ("torch.autograd.forward_ad", "_current_level"),
        ("torch._C._functorch", "is_legacy_batchedtensor"),
        ("torch._subclasses.fake_tensor", "FakeTensor"),
        ("torch.nested._internal.nested_tensor", "NestedTensor"),
    ],
)
def test_one_of_them_may_be_missing(owner, name):
    """It is hidden while the package is imported: torch itself needs it afterwards."""
    script = f"""
import importlib, torch
owner = importlib.import_module({owner!r})
hidden = owner.{name}
del owner.{name}
from flatten_ext._torch import private
owner.{name} = hidden
import flatten_ext
{TRAINS}
"""
    done = python("-W", "ignore", "-c", script)
    assert done.returncode == 0, done.stderr[-3000:]


def test_all_of_them_are_there_today():
    """In this torch: torch.func works."""
    done = python("-W", "ignore", "-c", f"import torch, flatten_ext\n{TRAINS}\n{TORCH_FUNC}")
    assert done.returncode == 0, done.stderr[-3000:]
