"""The command line. `info` runs with torch alone; the other commands need the extra `cli`."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flatten_ext import info
from flatten_ext.errors import InputError, one_line
from flatten_ext.extras import MissingExtra, require
from flatten_ext.tools import commands
from flatten_ext.tools.run import program

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
        cls=_group(),
        name="flatten-ext",
        help="Focused linear attention for vision transformers.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for module in pkgutil.iter_modules(commands.__path__):
        importlib.import_module(f"{commands.__name__}.{module.name}").register(app)
    return app


def _group() -> type[typer.core.TyperGroup]:
    """The commands' group, which tells every mistake of the user in one plain line, without a traceback."""
    typer = require("typer", "cli", "the command line")
    # Newer versions of typer have click inside, older ones beside them.
    usage_error, click_exception = typer.BadParameter.__mro__[1:3]

    base: Any = importlib.import_module("typer.core").TyperGroup

    class Group(base):
        def invoke(self, ctx: Any) -> Any:
            try:
                return super().invoke(ctx)
            except click_exception as error:
                command = f"{ctx.command_path} {ctx.invoked_subcommand or ''}".rstrip()
                hint = f" (see {command} --help)" if isinstance(error, usage_error) else ""
                message, status = f"{error.format_message()}{hint}", error.exit_code
            except (InputError, MissingExtra, FloatingPointError, OSError, EOFError) as error:
                if isinstance(error, BrokenPipeError):
                    raise
                message, status = one_line(error), 1
            typer.echo(f"flatten-ext {ctx.invoked_subcommand or ''}".rstrip() + f": {message}", err=True)
            raise typer.Exit(status)

    return Group


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line (default: this process's) and exits.

    Status 1 where an extra is missing, or `info` finds that no operator can run.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["info"]:  # plain text and no dependency: it must work where nothing else does
        print(info.render(info.installation()))
        if broken := info.problem():
            sys.exit(f"flatten-ext: {broken}")
        return
    if arguments[:1] == ["run"] and arguments[1:2] not in (["-h"], ["--help"]):
        # Without typer, which the program need not have; its exceptions are its own.
        try:
            start = program(arguments[1:])
        except (InputError, MissingExtra) as error:
            sys.exit(f"flatten-ext run: {error}")
        start()
        return
    try:
        build_app()(arguments)
    except MissingExtra as error:
        sys.exit(f"flatten-ext: {error}")
