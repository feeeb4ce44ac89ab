"""One process at a time in a folder: a lock of the operating system, which ends with its process."""

from __future__ import annotations

import fcntl
import os
import socket
import weakref
from pathlib import Path
from typing import IO

from flatten_ext.errors import InputError

__all__ = ["FolderLock"]

_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """Holds a folder until `release`, or until the process ends, however it ends.

    The file `.lock` in the folder stays; it alone means nothing, so none is ever stale.

    Raises:
        InputError: another process, or another lock of this one, holds the folder; naming both.
    """

    def __init__(self, folder: Path) -> None:
        self._file: IO[str] | None = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise InputError(f"{folder} is in use by {holder}: one run at a time") from None
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        _held.add(self)

    def release(self) -> None:
        """Lets others have the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _leave_to_parent() -> None:
    # A forked child (a DataLoader's worker) shares the lock, and would hold it when its parent was killed.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_leave_to_parent)
