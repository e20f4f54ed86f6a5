"""Finished bundles compared with the model they were built from, again and elsewhere.

The reference is made as a build makes it; the bundle is only read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile import bundle
from sdcompile.errors import RecipeError, StageError
from sdcompile.files import size_bytes
from sdcompile.recipe import Recipe, known_names
from sdcompile.run import build, lay_out
from sdcompile.runtime.opening import require_backends

if TYPE_CHECKING:
    from sdcompile.bundle import Manifest
    from sdcompile.console import Observer
    from sdcompile.store import Store


def source_of(folder: Path, manifest: Manifest, named: str | None) -> str:
    """The source a bundle can be compared with: `named`, or what its manifest says.

    Raises RecipeError when only the builder of the bundle has its source.
    """
    source: str = named or manifest.recipe["source"]
    if source.startswith(("folder:", "file:")):
        raise RecipeError(f"{folder} was built from {source}, which only its builder has", "name it: --source FOLDER")
    return source


def verify_bundle(
    folder: Path, source: str | None, store: Store, observer: Observer, *, offline: bool
) -> dict[str, Any]:
    """Compare a finished bundle's engines with `source` again, on this machine.

    The reference recordings come from the store or are made; the bundle is only read. Raises
    VerifyError when a floor is missed, HostError when one of its engines cannot run here.
    """
    from sdcompile.steps import verify
    from sdcompile.steps.report import fault

    manifest = bundle.read(folder)
    bundle.check(folder, manifest)
    require_backends(folder, manifest, tuple(manifest.components))
    source = source_of(folder, manifest, source)
    recipe = Recipe.model_validate({**manifest.recipe, "source": source}, context=known_names())
    work = lay_out(recipe, Path.cwd(), store, offline=offline)
    plan = work.plan.until("verify")
    records = [step.name for step in plan if step.op == "record"]
    if not records:
        raise StageError(f"{folder} was built with a backend that cannot be verified")
    work.plan = plan.upstream_of(records)
    with observer.watching(work.plan):
        samples = build(work, "verify", observer)[records[0]]
        reports = verify.recheck(folder, manifest, samples)
    for component, report in reports.items():
        if not report["passed"]:
            raise fault(report, folder)
        observer.note(f"{component}: passed")
    return {
        "name": manifest.name,
        "bundle": str(folder),
        "bytes": size_bytes(folder),
        "folders": {},
        "reports": reports,
        "fallbacks": {},
    }
