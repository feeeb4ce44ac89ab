"""`info`: versions, libraries, instruction sets and settings, to paste in a bug report."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from flatten_ext import info


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command("info")
    def command(
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Show versions, libraries, instruction sets and settings: the block for a bug report."""
        facts = info.installation()
        print(json.dumps(facts, indent=1) if as_json else info.render(facts))
        if broken := info.problem():
            sys.exit(f"flatten-ext: {broken}")
