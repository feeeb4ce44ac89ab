"""Files that appear whole or not at all, and places that are tried before the work."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import torch

from flatten_ext.errors import InputError

__all__ = [
    "remove_unfinished",
    "replacing",
    "try_file",
    "try_folder",
    "write_atomically",
    "write_json",
    "write_text",
    "write_torch",
]

# What a full disk is tried with: more than a file of this size finds room in its folder's entry.
_TRIAL_BYTES = 1 << 16


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that takes its name on success and is removed on failure.

    An interrupted run, or a power cut, leaves the earlier file or the new one, whole. Missing folders are
    made.

    Raises:
        InputError: `path` cannot be written; naming it and why.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_prefix(path), suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes private files; what is published gets what open() would have given it.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)  # the rename itself must survive a power cut too
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    return f".{path.stem}-unfinished-"


def _flush(path: Path) -> None:
    """Has the system write a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(*paths: Path) -> None:
    """Removes what a killed process left of its `replacing(path)`: for who knows that no other one runs."""
    for path in paths:
        for left in path.parent.glob(f"{_prefix(path)}*{path.suffix}"):
            left.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Has `write` write a binary file through `replacing`; of version 0.1, until 0.3."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        write(file)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text through `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON through `replacing`; NaN is an error, for it is not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_torch(path: Path, value: Any) -> None:
    """Writes `value` by torch.save through `replacing`."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        watched = _Watched(file)
        try:
            torch.save(value, cast(IO[bytes], watched))
        except RuntimeError as error:  # torch's archive writer says no more than that a position is wrong
            raise watched.error or error from error


class _Watched:
    """A binary file that remembers why it could not be written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def try_file(path: Path) -> None:
    """Makes the folder of a file that is to be written after long work, and tries to write there.

    Raises:
        InputError: it cannot be written; naming it and why.
    """
    if path.is_dir():
        raise InputError(f"{path} cannot be written: it is a folder")
    with suppress(_Tried), replacing(path) as temporary:
        temporary.write_bytes(bytes(_TRIAL_BYTES))
        _flush(temporary)
        raise _Tried


def try_folder(folder: Path, *names: str) -> None:
    """Makes a folder, and tries to write the files of these names in it, as `try_file` does.

    Raises:
        InputError: the folder cannot be made or written; naming it and why.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} cannot be written: it is a file, expected a folder")
    for name in names or ("trial",):
        try_file(folder / name)


class _Tried(Exception):
    """Leaves `replacing` without a new file."""
