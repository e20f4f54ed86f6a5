"""The command line: one short function per command.

Rooms are imported inside the functions, so that `--help` never waits for numpy or torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sdcompile import __version__
from sdcompile.errors import RecipeError, SdcompileError
from sdcompile.spec import Stage

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
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder the bundle is written to.", metavar="DIR")]

STORE = Path("artifacts")


def main() -> None:
    """The console script."""
    app()


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


def _stage_command(name: str, stage: Stage, short: str, summary: str) -> None:
    """Register the command that makes everything up to `stage`."""

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

    command.__doc__ = f"{summary}\n\nExample: `sdcompile {name} recipes/tiny-openvino-bf16.yaml`"
    app.command(name, short_help=short, rich_help_panel="Build")(reported(command))


_stage_command(
    "build", "package", "Recipe -> verified bundle.", "Build a recipe into a verified bundle, OUTPUT/NAME.sdc."
)
_stage_command("export", "export", "Only up to the ONNX files.", "Make everything up to the ONNX files.")
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
) -> None:
    from sdcompile import console, run, status
    from sdcompile.store import Store

    observer = console.observer(json_mode=json)
    work = run.prepare(recipe, sets, Store(store), offline=offline)
    status.check_component(work, only)
    for note in work.plan.notes:
        observer.warn(note)
    with observer.watching(work.plan.until(stage, only)):
        paths = run.build(work, stage, observer, only=only, force=force)
    bundle_step = "pipeline.package.bundle"
    placed = run.place(work, paths[bundle_step], output) if bundle_step in paths else None
    console.show_result(run.outcome(work, paths, placed), json_mode=json)


@app.command(short_help="Engines against the torch reference.", rich_help_panel="Build")
@reported
def verify(
    target: Annotated[
        Path, typer.Argument(metavar="RECIPE|BUNDLE", help="A recipe to build and verify, or a bundle to verify again.")
    ],
    source: Annotated[
        str | None, typer.Option("--source", help="For a bundle: the source model to compare with.", metavar="SOURCE")
    ] = None,
    store: StorePath = STORE,
    set_: Sets = None,
    only: Only = None,
    offline: Offline = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Compare every engine with the torch reference: of a recipe, or of a finished bundle.

    Examples: `sdcompile verify recipes/tiny-openvino-bf16.yaml`,
    `sdcompile verify artifacts/tiny-openvino-bf16.sdc --source builtin:tiny`
    """
    if not target.is_dir():
        _build(target, "verify", STORE, store, tuple(set_ or ()), only, offline, force, json)
        return
    from sdcompile import console, run
    from sdcompile.store import Store

    observer = console.observer(json_mode=json)
    console.show_result(run.verify_bundle(target, source, Store(store), observer, offline=offline), json_mode=json)


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
def doctor(store: StorePath = STORE, json: Json = False) -> None:
    """List backends, devices, memory and disk, and how to get what is missing.

    Example: `sdcompile doctor`
    """
    from sdcompile import console, status

    console.show_doctor(status.doctor(store), json_mode=json)


@app.command(short_help="What a bundle is.", rich_help_panel="Understand")
@reported
def inspect(bundle: BundlePath, json: Json = False) -> None:
    """Print what a bundle is, without loading an engine.

    Example: `sdcompile inspect artifacts/tiny-openvino-bf16.sdc`
    """
    from sdcompile import bundle as bundles
    from sdcompile import console

    manifest = bundles.read(bundle)
    console.show_manifest(bundle, manifest.model_dump(mode="json"), bundles.digest(bundle), json_mode=json)


@app.command(short_help="Make images with a bundle.", rich_help_panel="Run")
@reported
def generate(
    bundle: BundlePath,
    prompt: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts.")],
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", help="What the images should not show.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", help="How strongly the prompt guides.")
    ] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="One of the bundle's samplers.")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="The same seed gives the same picture (default: a new one, shown).")
    ] = None,
    size: Annotated[str | None, typer.Option("--size", help="WIDTHxHEIGHT in pixels.", metavar="WxH")] = None,
    count: Annotated[int, typer.Option("-n", "--count", help="Images per prompt.", min=1)] = 1,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the PNGs.", metavar="DIR")] = Path("out"),
    latents: Annotated[
        Path | None, typer.Option("--latents", help="Initial noise, .npy (N, C, h, w) float32.", metavar="FILE")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads per engine.", min=1)] = None,
    json: Json = False,
) -> None:
    """Make images with a bundle. No torch is needed.

    Example: `sdcompile generate artifacts/tiny-openvino-bf16.sdc "a red circle" --seed 1 --steps 20`
    """
    from sdcompile import console, load
    from sdcompile.runtime.saving import generate_files

    height, width = _size(size)
    pipeline = load(bundle, threads=threads)
    with console.generating(len(prompt) * count, json_mode=json) as progress:
        files = generate_files(
            pipeline, prompt, output, negative_prompt=negative_prompt, num_inference_steps=steps,
            guidance_scale=guidance_scale, sampler=sampler, seed=seed, height=height, width=width,
            num_images_per_prompt=count, latents=latents, progress=progress,
        )  # fmt: skip
    console.show_images(files, json_mode=json)


def _size(text: str | None) -> tuple[int | None, int | None]:
    """ "WxH" -> (height, width)."""
    if text is None:
        return None, None
    width, _, height = text.lower().partition("x")
    if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise RecipeError(f"--size {text}: not a size", "write WIDTHxHEIGHT, e.g. --size 512x512")
    return int(height), int(width)


@app.command(short_help="A commented recipe to start from.", rich_help_panel="Start")
@reported
def init(
    path: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe file to write.")] = Path("recipe.yaml"),
    source: Annotated[
        str, typer.Option("--source", help="builtin:tiny, a folder, hf://org/name@revision or a .safetensors file.")
    ] = "builtin:tiny",
    family: Annotated[str, typer.Option("--family")] = "sd",
    backend: Annotated[str, typer.Option("--backend")] = "openvino",
    precision: Annotated[str, typer.Option("--precision")] = "bf16",
) -> None:
    """Write a commented recipe to start from.

    Example: `sdcompile init my.yaml --source hf://org/model@main --backend onnxruntime --precision fp32`
    """
    from sdcompile import console, recipe

    if path.exists():
        raise RecipeError(f"{path} already exists", "choose another file name")
    text = recipe.starter(family=family, backend=backend, precision=precision, source=source, name=path.stem)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error.strerror}") from error
    console.note(f"wrote {path}; build it with: sdcompile build {path}")


@app.command(short_help="JSON schema of recipes, for editors.", rich_help_panel="Start")
@reported
def schema() -> None:
    """Print the JSON schema of recipes, for editors.

    Example: `sdcompile schema > recipe.schema.json`
    """
    import json as jsons

    from sdcompile import recipe

    typer.echo(jsons.dumps(recipe.schema(), indent=2))


@app.command(short_help="Free disk space.", rich_help_panel="Start")
@reported
def gc(
    store: StorePath = STORE,
    older_than: Annotated[
        float, typer.Option("--older-than", help="Only what was not used for so many days.", metavar="DAYS", min=0)
    ] = 0.0,
    everything: Annotated[bool, typer.Option("--all", help="Also what recipes used last.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    json: Json = False,
) -> None:
    """Free disk space: drop steps that no recipe used last, and leftovers of killed builds.

    Example: `sdcompile gc --dry-run`
    """
    from sdcompile import console
    from sdcompile.store import Store

    found = Store(store)
    keep = frozenset() if everything else found.last_keys()
    console.show_gc(found.gc(keep, older_than_s=older_than * 86400, dry_run=dry_run), dry_run=dry_run, json_mode=json)


if __name__ == "__main__":
    main()
