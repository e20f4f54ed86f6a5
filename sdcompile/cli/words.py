"""What every command shares: the app, the options, and how errors become exit codes.

A command is a short function in the module of its help panel; rooms are imported inside functions,
so that `--help` never waits for numpy or torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sdcompile.errors import SdcompileError

EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="sdcompile",
    help="Compile Stable Diffusion models into verified, deployable engines.",
    epilog="Exit codes: 0 done · 2 recipe or argument · 3 this machine · 4 a step failed · 5 verification · "
    "6 regression · 7 bundle · 130 stopped with Ctrl-C",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe file (YAML).")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle folder (NAME.sdc).")]
StorePath = Annotated[
    Path, typer.Option("--store", envvar="SDCOMPILE_STORE", help="Where finished steps are kept.", metavar="DIR")
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Change one recipe field, e.g. components.unet.precision=fp32. Repeatable.", metavar="KEY=VALUE"
    ),
]
Only = Annotated[str | None, typer.Option("--only", help="Make only what this component needs.", metavar="COMPONENT")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network; use what is cached.")]
Force = Annotated[bool, typer.Option("--force", help="Start even if memory or disk look too small.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON event per line on stdout.")]
Target = Annotated[
    str | None,
    typer.Option("--target", help="One of a bundle's targets.  [default: the first that runs here]", metavar="NAME"),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder the bundle is written to.", metavar="DIR")]

STORE = Path("artifacts")


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors a user can cause into a message and an exit code; anything else is a bug and stays one."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from sdcompile import console

        json_mode = bool(kwargs.get("json", False))
        try:
            with console.warnings_told(json_mode=json_mode):
                command(*args, **kwargs)
        except SdcompileError as error:
            console.report_error(error, json_mode=json_mode)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            console.note("stopped; finished steps are kept, the same command goes on from there")
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return run
