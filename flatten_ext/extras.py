"""Optional dependencies: the core needs torch alone, and what needs more says in one line how to get it."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["MissingExtra", "require"]


class MissingExtra(ImportError):
    """A package that belongs to one of flatten-ext's extras is not installed; the message is for the user."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{package} is not installed, and {purpose} needs it: pip install 'flatten-ext[{extra}]'",
            name=package,
        )


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports `module`, or raises MissingExtra naming the pip command that brings it.

    Args:
        module: what to import, such as "matplotlib.pyplot"; its first part names the package.
        extra: the extra of flatten-ext that holds it.
        purpose: who needs it, as the subject of a sentence ("the picture").
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # installed, but broken: that is another problem, and its own message tells it
        raise MissingExtra(package, extra, purpose) from error
