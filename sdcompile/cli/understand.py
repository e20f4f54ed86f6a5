"""Commands that only look: what would be built and why, what this machine and a bundle are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcompile.cli.words import STORE, BundlePath, Json, Offline, Only, RecipePath, Sets, StorePath, app, reported
from sdcompile.errors import HostError, RecipeError


@app.command(short_help="Every step: hit or miss, and why.", rich_help_panel="Understand")
@reported
def plan(
    recipe: RecipePath,
    store: StorePath = STORE,
    set_: Sets = None,
    only: Only = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Show every step a build would take: hit or miss, why, and what it needs.

    Example: `sdcompile plan recipes/tiny-openvino-bf16.yaml --set precision=fp32`
    """
    from sdcompile import console, run, status
    from sdcompile.store import Store

    work = run.prepare(recipe, tuple(set_ or ()), Store(store), offline=offline)
    status.check_component(work, only)
    console.show_plan(status.rows(work, only), work.plan.notes, json_mode=json)


@app.command(short_help="What a step's key is made of.", rich_help_panel="Understand")
@reported
def explain(
    recipe: RecipePath,
    step: Annotated[str, typer.Argument(metavar="STEP", help="As `plan` names it, e.g. unet.export.onnx.")],
    store: StorePath = STORE,
    set_: Sets = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Show what a step's key is made of, and what changed since it was last made.

    Example: `sdcompile explain recipes/tiny-openvino-bf16.yaml unet.compile.openvino`
    """
    from sdcompile import console, run, status
    from sdcompile.store import Store

    work = run.prepare(recipe, tuple(set_ or ()), Store(store), offline=offline)
    console.show_explanation(status.explanation(work, step), json_mode=json)


@app.command(short_help="What this machine has and lacks.", rich_help_panel="Understand")
@reported
def doctor(
    store: StorePath = STORE,
    selftest: Annotated[
        Path | None,
        typer.Option(
            "--selftest",
            help="Build, verify and time the tiny model with every NVIDIA backend here; write the report to FILE.",
            metavar="FILE",
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="With --selftest: also the full-size model --source, timed beside torch on the GPU."
        ),
    ] = False,
    source: Annotated[
        str | None,
        typer.Option("--source", help="With --full: a diffusers folder or hf://org/name of SD 1.5.", metavar="SOURCE"),
    ] = None,
    json: Json = False,
) -> None:
    """List backends, devices, memory and disk, and how to get what is missing.

    Examples: `sdcompile doctor`, `sdcompile doctor --selftest artifacts/gpu-report.json`,
    `sdcompile doctor --selftest artifacts/gpu-report.json --full --source artifacts/sd15`
    """
    from sdcompile import console, status

    if (full or source) and not (full and source and selftest):
        raise RecipeError(
            "--full, --source and --selftest FILE belong together",
            "weights of any value do: python scripts/make_full_size.py sd15 artifacts/sd15, then "
            "--selftest FILE --full --source artifacts/sd15 (or, in a checkout: make gpu-check-full)",
        )

    if selftest is not None:
        from sdcompile import selftest as selftests
        from sdcompile.store import Store

        report = selftests.selftest(Store(store), selftest, console.observer(json_mode=json), source)
        console.show_selftest(selftest, report, json_mode=json)
        return
    console.show_doctor(status.doctor(store), json_mode=json)


@app.command(short_help="What a bundle is.", rich_help_panel="Understand")
@reported
def inspect(
    bundle: BundlePath,
    layers: Annotated[
        bool, typer.Option("--layers", help="The compiler's own layer tables of NVIDIA engines, and what they prove.")
    ] = False,
    target: Annotated[
        str | None, typer.Option("--target", help="One of a bundle's targets.  [default: all]", metavar="NAME")
    ] = None,
    json: Json = False,
) -> None:
    """Print what a bundle is, without loading an engine.

    Example: `sdcompile inspect artifacts/tiny-openvino-bf16.sdc`
    """
    from sdcompile import bundle as bundles
    from sdcompile import console, status
    from sdcompile.runtime import choosing

    if layers:
        console.show_layers(status.layer_tables(bundle, target), json_mode=json)
        return
    manifest = bundles.read(bundle)
    if target is not None:
        choosing.named(bundle, manifest, target)
        manifest = manifest.model_copy(update={"targets": {target: manifest.targets[target]}})
    console.show_manifest(bundle, manifest.model_dump(mode="json"), bundles.digest(bundle), json_mode=json)


@app.command(short_help="Can this machine run a bundle?", rich_help_panel="Understand")
@reported
def check(
    bundle: BundlePath,
    target: Annotated[
        str | None, typer.Option("--target", help="Only this one of a bundle's targets.", metavar="NAME")
    ] = None,
    json: Json = False,
) -> None:
    """Say, without loading an engine, whether this machine can run a bundle and what would have to be rebuilt.

    Of a bundle of several targets, which of them run here and which one `generate` takes. Exit code 3 when
    none does.

    Examples: `sdcompile check artifacts/tiny-openvino-bf16.sdc`, `sdcompile check my.sdc --target openvino`
    """
    from sdcompile import console, status

    found = status.fitness(bundle, target)
    console.show_fitness(found, json_mode=json)
    if not found["runs"]:
        raise typer.Exit(HostError.exit_code)
