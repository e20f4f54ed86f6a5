"""Commands that make things: every stage up to the bundle, and verification."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcompile.cli.words import (
    STORE,
    BundlePath,
    Force,
    Json,
    Offline,
    Only,
    Output,
    RecipePath,
    Sets,
    StorePath,
    app,
    reported,
)
from sdcompile.errors import RecipeError, VerifyError
from sdcompile.spec import Stage


def _stage_command(name: str, stage: Stage, short: str, summary: str, example: str = "tiny-openvino-bf16") -> None:
    """Register the command that makes everything up to `stage`; `example` is a recipe that has such a stage."""

    def command(
        recipe: RecipePath,
        output: Output = STORE,
        store: StorePath = STORE,
        set_: Sets = None,
        only: Only = None,
        offline: Offline = False,
        force: Force = False,
        json: Json = False,
    ) -> None:
        _build(recipe, stage, output, store, tuple(set_ or ()), only, offline, force, json)

    command.__doc__ = f"{summary}\n\nExample: `sdcompile {name} recipes/{example}.yaml`"
    app.command(name, short_help=short, rich_help_panel="Build")(reported(command))


_stage_command(
    "build", "package", "Recipe -> verified bundle.", "Build a recipe into a verified bundle, OUTPUT/NAME.sdc."
)
_stage_command(
    "prune", "prune", "Only up to the pruned checkpoints.", "Make everything up to the pruned checkpoints.",
    "tiny-openvino-heads25",
)  # fmt: skip
_stage_command("export", "export", "Only up to the ONNX files.", "Make everything up to the ONNX files.")
_stage_command(
    "calibrate", "calibrate", "Only the samples that passes are fitted to.", "Record the samples that passes want.",
    "tiny-openvino-int8",
)  # fmt: skip
_stage_command(
    "quantize", "quantize", "Only up to the last pass.", "Make everything up to what the last pass writes.",
    "tiny-openvino-int8",
)  # fmt: skip
_stage_command("compile", "compile", "Only up to the engines.", "Make everything up to the engines.")
_stage_command("package", "package", "The same as build.", "The same as build: verify is never skipped on the way.")


def _build(
    recipe: Path,
    stage: Stage,
    output: Path,
    store: Path,
    sets: tuple[str, ...],
    only: str | None,
    offline: bool,
    force: bool,
    json: bool,
    polygraphy: Path | None = None,
    polygraphy_run: bool = False,
) -> None:
    from sdcompile import console, evidence, run, status
    from sdcompile.store import Store

    observer = console.observer(json_mode=json)
    work = run.prepare(recipe, sets, Store(store), offline=offline)
    status.check_component(work, only)
    status.check_stage(work, stage)
    for note in work.plan.notes:
        observer.warn(note)

    def hand_over() -> None:
        if polygraphy is not None:
            commands = evidence.polygraphy(work, polygraphy, only)
            found = evidence.run(polygraphy, commands) if polygraphy_run else {}
            console.show_commands(polygraphy, commands, found, json_mode=json)

    try:
        with observer.watching(work.plan.until(stage, only)):
            paths = run.build(work, stage, observer, only=only, force=force)
    except VerifyError as error:
        hand_over()
        if polygraphy is None and (words := evidence.words(work, recipe, sets, store, only)):
            error.hint += f"\nwhich node is at fault, by Polygraphy: {words}"
        raise
    hand_over()
    bundle_step = "pipeline.package.bundle"
    placed = run.place(work, paths[bundle_step], output) if bundle_step in paths else None
    console.show_result(status.outcome(work, paths, placed), json_mode=json)


@app.command(short_help="Engines against the torch reference.", rich_help_panel="Build")
@reported
def verify(
    target: Annotated[
        Path, typer.Argument(metavar="RECIPE|BUNDLE", help="A recipe to build and verify, or a bundle to verify again.")
    ],
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            help="For a bundle: the source model to compare with; COMPONENT=SOURCE: of a component that has its own.",
            metavar="SOURCE",
        ),
    ] = None,
    of_target: Annotated[
        str | None,
        typer.Option(
            "--target", help="For a bundle: one of its targets.  [default: all that run here]", metavar="NAME"
        ),
    ] = None,
    store: StorePath = STORE,
    set_: Sets = None,
    only: Only = None,
    polygraphy: Annotated[
        Path | None,
        typer.Option(
            "--polygraphy",
            help="Of a recipe: also write each engine's worst call as Polygraphy files, and commands that bisect it.",
            metavar="DIR",
        ),
    ] = None,
    polygraphy_run: Annotated[
        bool,
        typer.Option("--polygraphy-run", help="With --polygraphy: also run those commands, and tell what they find."),
    ] = False,
    offline: Offline = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Compare every engine with the torch reference: of a recipe, or of a finished bundle.

    Examples: `sdcompile verify recipes/tiny-openvino-bf16.yaml`,
    `sdcompile verify artifacts/tiny-openvino-bf16.sdc --source builtin:tiny`
    """
    if polygraphy_run and polygraphy is None:
        raise RecipeError("--polygraphy-run: there is nothing to run", "name a folder as well: --polygraphy DIR")
    if not target.is_dir():
        if of_target is not None:
            raise RecipeError(f"--target: {target} is no bundle", "a recipe is verified for all of its targets")
        changes = tuple(set_ or ())
        _build(target, "verify", STORE, store, changes, only, offline, force, json, polygraphy, polygraphy_run)
        return
    if polygraphy is not None:
        raise RecipeError(
            f"--polygraphy: {target} is a bundle, which holds no ONNX", "name the recipe it was built from"
        )
    from sdcompile import console, recheck
    from sdcompile.store import Store

    observer = console.observer(json_mode=json)
    found = recheck.verify_bundle(target, source or (), Store(store), observer, offline=offline, target=of_target)
    console.show_result(found, json_mode=json)


@app.command(short_help="One target of a bundle, as a bundle.", rich_help_panel="Build")
@reported
def extract(
    bundle: BundlePath,
    target: Annotated[str, typer.Option("--target", help="The target to take out.", metavar="NAME")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write to.  [default: beside BUNDLE]", metavar="DIR")
    ] = None,
    json: Json = False,
) -> None:
    """Take one target out of a bundle of several, for machines that need no other: NAME-TARGET.sdc.

    Nothing is built again: files are linked, figures of verification go along.

    Example: `sdcompile extract artifacts/tiny-fat.sdc --target openvino`
    """
    from sdcompile import console, extraction

    console.show_extracted(extraction.extract(bundle, target, output), json_mode=json)
