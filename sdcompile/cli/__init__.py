"""The command line: one short function per command, one module per panel of `sdcompile --help`."""

from __future__ import annotations

from typing import Annotated

import typer

from sdcompile import __version__
from sdcompile.cli.words import app

# Importing a module registers its commands; this is the order in which `--help` lists the panels.
# isort: off
from sdcompile.cli import build, understand, compression, generate, measure, start  # noqa: F401
# isort: on

__all__ = ["app", "main"]


def main() -> None:
    """The console script."""
    app()


def _version(value: bool) -> None:
    if value:
        typer.echo(f"sdcompile {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Compile Stable Diffusion models into verified, deployable engines."""
