"""What the fp32 reference draws: the bundle's own request, answered by torch through the same runtime.

Pictures are kept in the store under what made them, so that a second evaluation reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile import machine
from sdcompile.backends import BACKENDS, Engine, Host
from sdcompile.families import FAMILIES
from sdcompile.measure.drawing import Request, draw
from sdcompile.recheck import recipe_of
from sdcompile.recipe import Recipe, known_names
from sdcompile.run import Build, build, lay_out
from sdcompile.runtime.model import Model
from sdcompile.runtime.options import exactly
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.spec import Say
from sdcompile.store import Store, key_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sdcompile.bundle import Manifest
    from sdcompile.console import Observer
    from sdcompile.plan import Plan

_REVISION = 2
_STEP = "pipeline.verify.pictures"
_ENGINES = ("step_cache", "widths")
"""Fields of a component that ask for further engines."""


@dataclass(frozen=True)
class Reference:
    """The fp32 modules a bundle was made from, planned and made up to torch engines."""

    work: Build
    folders: dict[str, Path]
    manifest: Manifest

    def pictures(self, prompts: Sequence[str], request: Request, say: Say) -> NDArray[np.float32]:
        """(N, H, W, 3) in [0, 1] for `prompts`, drawn now or read from the store (memory-mapped)."""
        store, name = self.work.store, self.work.recipe.name
        parts = self.made_of(prompts, request)
        key = key_of(parts)
        if store.get(key) is None:
            with store.making(key, parts, _STEP, name) as out:
                if out is not None:
                    with self._pipeline() as pipeline:
                        np.save(out / "pictures.npy", draw(pipeline, prompts, request, say))
        store.check(key)
        pictures: NDArray[np.float32] = np.load(store.path(key) / "pictures.npy", mmap_mode="r")
        return pictures

    def made_of(self, prompts: Sequence[str], request: Request) -> dict[str, Any]:
        """Everything that decides the pictures of `prompts`: also options that only the bundle's defaults name."""
        return {
            "op": "pictures", "revision": _REVISION, "prompts": list(prompts), "request": request.as_json(),
            "inputs": {step.name: step.key for step in self.work.plan if step.stage == "compile"},
            "options": exactly(self.manifest.defaults.options), "machine": machine.identity(),
        }  # fmt: skip

    def _pipeline(self) -> Pipeline:
        manifest = self.manifest
        model = Model.from_parts(
            "reference", manifest.family, manifest.facts, manifest.ranges(),
            self.folders["pipeline.compile.tokenizer"], self.folders[_tables(self.work.plan)],
            manifest.defaults.model_copy(update={"options": exactly(manifest.defaults.options)}),
        )  # fmt: skip

        def open_engine(component: str) -> Engine:
            return BACKENDS["reference"].open(self.folders[f"{component}.compile.reference"], Host())

        return Pipeline(model, open_engine)


def reference_of(
    folder: Path, manifest: Manifest, source: Sequence[str], store: Store, observer: Observer, *, offline: bool
) -> Reference:
    """Plan and make the reference of the bundle in `folder`; source: what was named of it (`recheck.sources_of`).

    Raises RecipeError when its source is not known here, HostError when torch is missing.
    """
    recipe = reference_recipe(manifest, recipe_of(folder, manifest, source))
    work = lay_out(recipe, Path.cwd(), store, offline=offline)
    goals = [step.name for step in work.plan if step.gives in ("engine", "tokenizer")] + [_tables(work.plan)]
    work.plan = replace(work.plan.upstream_of(goals), goals=tuple(goals))
    return Reference(work, build(work, "compile", observer), manifest)


def _tables(plan: Plan) -> str:
    """The step that gives the sampler tables: the last one, which may have added fitted ones."""
    return [step.name for step in plan if step.gives == "tables"][-1]


def reference_recipe(manifest: Manifest, recipe: Mapping[str, Any]) -> Recipe:
    """The bundle's `recipe` with every component as it was before anything was done to it: torch, fp32.

    A decoder of another source is what the recipe asks for, so that the reference draws with it as well.
    """
    family = FAMILIES[manifest.family]
    components = {
        name: {key: value for key, value in row.items() if key in family.fields(name) and key not in _ENGINES}
        for name, row in recipe.get("components", {}).items()
        if name != family.shallow and family.plain(name) == name
    }
    keep = ("version", "family", "source", "source_config", "shapes", "samplers", "sampler_steps", "defaults")
    data: dict[str, Any] = {key: recipe[key] for key in keep if key in recipe}
    data["defaults"] = exactly(data.get("defaults", {}))
    data |= {"name": f"{manifest.name}-reference", "backend": "reference", "precision": "fp32"}
    return Recipe.model_validate({**data, "components": components}, context=known_names())
