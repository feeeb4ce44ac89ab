"""The module paths of version 0.1, importable until 0.3: each import warns and names the new path."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["MOVED", "new_path"]

# Old path -> new path, below flatten_ext. The modules of a folder move with it, but for those named here too.
MOVED = {
    "bench": "tools.bench",
    "bench.style": "tools.style",
    "cli": "tools.cli",
    "commands": "tools.commands",
    "conversion": "models.convert",
    "data": "tools.data",
    "demo": "tools.demo",
    "demo.images": "tools.micro.images",
    "demo.models": "tools.micro.models",
    "demo.training": "tools.micro.training",
    "evaluate": "tools.evaluate",
    "figures": "tools.figures",
    "train": "tools.train",
    "visualize": "analysis",
}
_PREFIX = f"{__package__}."


def new_path(name: str) -> str | None:
    """Where the module of a full old name lies now: "flatten_ext.visualize" -> "flatten_ext.analysis"."""
    if not name.startswith(_PREFIX):
        return None
    old = name.removeprefix(_PREFIX)
    folder, _, module = old.rpartition(".")
    if old in MOVED:
        return _PREFIX + MOVED[old]
    return f"{_PREFIX}{MOVED[folder]}.{module}" if folder in MOVED else None


class _Redirect(Loader):
    """Fills the module of an old name with a view of the one that took its place."""

    def __init__(self, new: str) -> None:
        self.new = new

    def exec_module(self, module: ModuleType) -> None:
        warnings.warn(
            f"{module.__name__} has moved to {self.new}; the old path goes with version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        real = importlib.import_module(self.new)
        module.__doc__ = real.__doc__
        module.__dict__["__all__"] = getattr(real, "__all__", [])
        module.__dict__["__getattr__"] = lambda name: getattr(real, name)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = new_path(fullname)
        # As a package, so that the modules of a moved folder are looked for, and found here.
        return None if new is None else ModuleSpec(fullname, _Redirect(new), is_package=True)


# First, since an upgraded checkout may keep an empty folder of an old name.
sys.meta_path.insert(0, _Finder())
