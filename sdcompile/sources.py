"""recipe -> Source: what a build is made of, from every place the recipe names.

Each place is described by the step that will read it; here their faults are gathered, each at its line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from sdcompile.errors import RecipeError
from sdcompile.families import FAMILIES
from sdcompile.recipe import Recipe
from sdcompile.steps import component, fetch, pictures
from sdcompile.steps.layout import HashFile, Source


def describe(recipe: Recipe, base: Path, *, offline: bool, hash_file: HashFile) -> Source:
    """The model, whose relative path starts at `base`, components' own sources and pictures; no weights are read.

    Raises RecipeError with the faults of all of them, HostError when the hub cannot be reached or asked.
    """
    family = FAMILIES[recipe.family]
    folders = tuple(dict.fromkeys(family.folder(name, ()) for name in recipe.wanted(family.required)))
    faults: list[RecipeError] = []

    def described(field: str, make: Callable[[], Source]) -> Source | None:
        try:
            return make()
        except RecipeError as error:
            what = error.message if field == "source" else f"{field}: {error.message}"
            where = recipe.where(field)
            faults.append(RecipeError(f"{where}: {what}" if where else what, error.hint))
            return None

    source = described("source", lambda: fetch.describe(
        recipe.source, base=base, source_config=recipe.source_config, folders=folders, offline=offline,
        hash_file=hash_file,
    ))  # fmt: skip
    parts: dict[str, Source] = {}
    for name, text in recipe.component_sources.items():
        field = f"components.{name}.source"
        part = described(field, partial(
            component.describe, text, name, base=recipe.base(field), offline=offline, hash_file=hash_file,
        ))  # fmt: skip
        if part is not None:
            parts[name] = part
    shown = recipe.calibrate.pictures
    photos = None if shown is None else described("calibrate.pictures", lambda: pictures.describe(
        recipe.path(shown, "calibrate.pictures"), shown, hash_file,
    ))  # fmt: skip
    if source is None or faults:
        hints = dict.fromkeys(fault.hint for fault in faults if fault.hint)
        raise RecipeError("\n".join(fault.message for fault in faults), "\n".join(hints))
    source = source.with_parts(parts) if parts else source
    return source if photos is None else replace(source, pictures=photos, notes=(*source.notes, *photos.notes))
