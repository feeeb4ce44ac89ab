"""`run`: another program with our models registered."""

from __future__ import annotations

from typing import Annotated

import typer

from flatten_ext.tools.run import program


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
    def command(
        arguments: Annotated[
            list[str],
            typer.Argument(metavar="[--onnx] SCRIPT|-m MODULE [ARGUMENTS]...", help="As behind `python`."),
        ],
    ) -> None:
        """Run a script or module with our models registered: timm's train.py, validate.py, ...

        With --onnx torch's ONNX exporter knows the operators too: for timm's onnx_export.py.
        """
        program(arguments)()
