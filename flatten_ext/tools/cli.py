"""The command line. `info` runs with torch alone; the other commands need the extra `cli`."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flatten_ext import info
from flatten_ext.tools import commands
from flatten_ext.tools.extras import MissingExtra, require

if TYPE_CHECKING:
    import typer

__all__ = ["build_app", "main"]


def build_app() -> typer.Typer:
    """The typer application with the command of every module in flatten_ext/tools/commands.

    Raises:
        MissingExtra: typer or rich is not installed.
    """
    typer = require("typer", "cli", "the command line")
    require("rich", "cli", "the command line")
    app = typer.Typer(
        name="flatten-ext",
        help="Focused linear attention for vision transformers.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for module in pkgutil.iter_modules(commands.__path__):
        importlib.import_module(f"{commands.__name__}.{module.name}").register(app)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line (default: this process's) and exits; status 1 where an extra is missing."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["info"]:  # plain text and no dependency: it must work where nothing else does
        print(info.render(info.installation()))
        return
    try:
        build_app()(arguments)
    except MissingExtra as error:
        sys.exit(f"flatten-ext: {error}")
