"""Commands around the work: a recipe to start from, its schema, disk space."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcompile.cli.words import STORE, Json, StorePath, app, reported
from sdcompile.errors import RecipeError


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
