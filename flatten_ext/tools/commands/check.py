"""`check`: whether the kernels compute what they should on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from flatten_ext.check import self_check


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command("check")
    def command(
        device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    ) -> None:
        """Run every family of kernels once against the formula in float64; exit code 1 if one is wrong."""
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("checking")

            def show(done: int, total: int, name: str) -> None:
                bar.update(task, completed=done, total=total, description=name)

            try:
                report = self_check(device, show)
            except (ValueError, RuntimeError) as error:
                raise typer.BadParameter(str(error).splitlines()[0], param_hint="--device") from None
        print(report)
        if not report.passed:
            raise typer.Exit(1)
