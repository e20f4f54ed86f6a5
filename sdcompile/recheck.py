"""Finished bundles compared with the model they were built from, again and elsewhere.

The reference is made as a build makes it; the bundle is only read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile import bundle
from sdcompile.errors import RecipeError, StageError
from sdcompile.families import FAMILIES
from sdcompile.files import size_bytes
from sdcompile.recipe import Recipe, known_names
from sdcompile.run import build, lay_out
from sdcompile.runtime.choosing import runnable, words
from sdcompile.spec import at_target

if TYPE_CHECKING:
    from sdcompile.bundle import Manifest
    from sdcompile.console import Observer
    from sdcompile.store import Store


def sources_of(folder: Path, manifest: Manifest, named: Sequence[str]) -> dict[str, str]:
    """The sources a bundle can be compared with: of the model ("source"), and of every component that has its own.

    They are those of the manifest, but for what `named` says: SOURCE, or COMPONENT=SOURCE. Raises
    RecipeError for a component that has none, or when only the builder of the bundle has one of them.
    """
    recipe = manifest.recipe
    found = {name: row["source"] for name, row in recipe.get("components", {}).items() if row.get("source")}
    found["source"] = recipe["source"]
    for text in named:
        name, equals, value = text.partition("=")
        name, value = (name, value) if equals and name in FAMILIES[manifest.family].folders else ("source", text)
        if name not in found:
            raise RecipeError(f"--source {text}: {name} of {folder} has no source of its own", "leave it out")
        found[name] = value
    for name, source in found.items():
        if source.startswith(("folder:", "file:")):
            what, how = (folder, "FOLDER") if name == "source" else (f"{name} of {folder}", f"{name}=FOLDER")
            raise RecipeError(f"{what} was built from {source}, which only its builder has", f"name it: --source {how}")
    return found


def recipe_of(folder: Path, manifest: Manifest, named: Sequence[str]) -> dict[str, Any]:
    """The recipe of a bundle, as data, with sources that are found from here. Raises as `sources_of` does."""
    found = sources_of(folder, manifest, named)
    components = {
        name: {**row, "source": found[name]} if name in found else row
        for name, row in manifest.recipe.get("components", {}).items()
    }
    # What passes were fitted to is not made again, and lies where the bundle was built.
    calibrate = {k: v for k, v in manifest.recipe.get("calibrate", {}).items() if k not in ("pictures", "prompts_file")}
    return {**manifest.recipe, "source": found["source"], "components": components, "calibrate": calibrate}


def verify_bundle(
    folder: Path, source: Sequence[str], store: Store, observer: Observer, *, offline: bool, target: str | None = None
) -> dict[str, Any]:
    """Compare a finished bundle's engines with their source again, on this machine.

    source: what was named of it (see `sources_of`). Of several targets, `target` is compared, or all that run here.
    The reference recordings come from the store or are made; the bundle is only read. Raises
    VerifyError when a floor is missed, HostError when no engine that is asked for can run here.
    """
    from sdcompile.steps import verify
    from sdcompile.steps.report import fault

    manifest = bundle.read(folder)
    ways, unfit = runnable(folder, manifest, target)
    bundle.check(folder, manifest, _read(ways) if manifest.targets else ("",))
    for verdict in unfit:
        observer.warn(f"{verdict.target} is not verified: {words(folder, verdict)}")
    recipe = Recipe.model_validate(recipe_of(folder, manifest, source), context=known_names())
    work = lay_out(recipe, Path.cwd(), store, offline=offline)
    plan = work.plan.until("verify")
    records = [step.name for step in plan if step.op == "record"]
    if not records:
        raise StageError(f"{folder} was built with a backend that cannot be verified")
    work.plan = plan.upstream_of(records)
    reports: dict[str, Any] = {}
    with observer.watching(work.plan):
        samples = build(work, "verify", observer)[records[0]]
        for one in ways:
            for component, report in verify.recheck(folder, one, samples).items():
                name = at_target(component, one.target)
                if not report["passed"]:
                    raise fault(report, folder, one.target)
                observer.note(f"{name}: passed")
                reports[name] = report
    return {
        "name": manifest.name,
        "bundle": str(folder),
        "bytes": size_bytes(folder),
        "folders": {},
        "reports": reports,
        "fallbacks": {},
    }


def _read(ways: list[Manifest]) -> tuple[str, ...]:
    """What images of these targets are made of: the start of the names of their files."""
    folders = [f"{one.folder_of(name)}/" for one in ways for name in one.components]
    return (*dict.fromkeys(folders), "samplers/", "tokenizer/")
