"""A checkpoint's file that cannot be read is named, with what was found in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families import small

from flatten_ext import models


class Opener:
    """Unpickled without care, it would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo run",)


UNREADABLE = {
    "list": ([1, 2], "no mapping|holds a list"),
    "tensor": (torch.zeros(2), "no mapping|holds a Tensor"),
    "number": (3, "no mapping|holds a int"),
    "numbered": ({1: torch.zeros(2)}, "1 for a parameter's name|no mapping"),
    "list-inside": ({"model": [1]}, "no mapping|holds a list"),
    "text-inside": ({"model": {"head.weight": "text"}}, "str under 'head.weight'"),
    "none-inside": ({"state_dict": None}, "holds a NoneType|no mapping"),
    "no-parameters": ({"model": {}}, "no parameters"),
    "object": (Opener(), "it holds an object of posix.system"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_of_something_else_is_named(name: str, tmp_path: Path) -> None:
    content, message = UNREADABLE[name]
    path = tmp_path / f"{name}.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"{name}\.pth .*({message})") as caught:
        models.load_official(small("deit"), path)
    assert "weights_only" not in str(caught.value)


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    model, whole = small("deit"), tmp_path / "whole.pth"
    torch.save(model.state_dict(), whole)
    content = whole.read_bytes()
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "garbage.pth").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "page.pth").write_text("<html>404</html>")
    (tmp_path / "garbage.safetensors").write_bytes(bytes(range(256)) * 9)
    for part in (10, len(content) // 2, len(content) - 30):
        (tmp_path / f"cut{part}.pth").write_bytes(content[:part])
    files = sorted(set(tmp_path.iterdir()) - {whole})
    assert len(files) == 7
    for file in files:
        with pytest.raises(
            ValueError, match=rf"checkpoint .*{file.name} (is empty|cannot be read)"
        ) as caught:
            models.load_official(model, file)
        assert "weights_only" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        models.load_official(model, tmp_path / "nowhere.pth")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        models.load_official(model, tmp_path)
