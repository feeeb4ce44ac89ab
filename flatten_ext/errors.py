"""Mistakes of the user: one exception, whose message is one sentence for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flatten_ext.extras import MissingExtra

__all__ = ["InputError", "blamed_on", "one_line"]


class InputError(ValueError):
    """An option, a file or a folder cannot be used: the message names it, and is all the user need see."""

    def __init__(self, message: str) -> None:
        # A DataLoader's worker process hands its exceptions on with its traceback before the message.
        super().__init__(message.rstrip().rpartition(f"{type(self).__name__}: ")[2])


@contextmanager
def blamed_on(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions that another package raises on bad input into an InputError that begins with `what`.

    Args:
        what: the option and its value, or the file.
        kinds: the exceptions; by default every one.
    """
    expected = kinds or (Exception,)
    try:
        yield
    except (InputError, MissingExtra, MemoryError):
        raise
    except expected as error:
        raise InputError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException, most: int = 4) -> str:
    """The message of an exception in one line; of a long list its first lines and how many more there are."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    more = f" ... and {len(lines) - most} more" if len(lines) > most else ""
    return " ".join(lines[:1]) + (" " if lines[1:] else "") + "; ".join(lines[1:most]) + more
