"""The last step: what the bundle is told of how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdcompile.plan import stepcaching
from sdcompile.plan.choice import Choice
from sdcompile.plan.draft import Draft
from sdcompile.plan.sampling import profiles
from sdcompile.plan.verification import default_size
from sdcompile.recipe import Recipe, dump
from sdcompile.spec import PIPELINE, Shapes

if TYPE_CHECKING:
    from sdcompile.steps.layout import Source


def package(
    draft: Draft,
    recipe: Recipe,
    chosen: Mapping[str, Choice],
    facts: Mapping[str, Any],
    shapes: Shapes,
    engines: Mapping[str, str],
    reports: Mapping[str, str],
    effects: Mapping[str, tuple[str, ...]],
    races: Mapping[str, str],
    shared: Mapping[str, str],
    fallbacks: Mapping[str, str],
) -> None:
    """The bundle. effects: component -> the pass steps on its road; shared: tokenizer and tables."""
    source = draft.source
    params = {
        # What the source is, not where it lies: a path would tie the bundle to a machine.
        "recipe": _recipe(recipe, source),
        "source": {
            "id": source.id, "kind": source.kind, "revision": source.revision, "licence": source.licence,
            "files": {path: f.sha256 for path, f in source.files.items()},
            **({"components": {name: _origin(part) for name, part in source.parts.items()}} if source.parts else {}),
        },
        "facts": facts,
        "fallbacks": dict(fallbacks),
        "components": {
            name: {"backend": choice.backend.name, "precision": choice.precision, "params": choice.params,
                   "spec": draft.steps[engines[name]].parts["spec"],
                   "passes": [draft.steps[step].op for step in effects[name]]}
            for name, choice in chosen.items()
        },
        "defaults": {
            "sampler": recipe.default_sampler,
            "num_inference_steps": recipe.defaults.num_inference_steps,
            "guidance_scale": recipe.defaults.guidance_scale,
            "negative_prompt": recipe.defaults.negative_prompt,
            **default_size(recipe, shapes),
            "options": stepcaching.defaults_of(recipe, draft.family),
        },
        "profiles": profiles(recipe),
    }  # fmt: skip
    inputs = {f"engine.{name}": engines[name] for name in chosen}
    inputs |= {f"pass.{name}.{draft.steps[step].op}": step for name, steps in effects.items() for step in steps}
    inputs |= {f"race.{name}": step for name, step in races.items()}
    inputs |= {f"report.{name}": step for name, step in reports.items()}
    draft.add(PIPELINE, "bundle", {**inputs, **shared}, params, shapes=shapes, disk=4 << 20)


def _recipe(recipe: Recipe, source: Source) -> dict[str, Any]:
    data = {**dump(recipe), "source": source.id}
    own = {name: {**data["components"][name], "source": part.id} for name, part in source.parts.items()}
    return {**data, "components": {**data["components"], **own}} if own else data


def _origin(part: Source) -> dict[str, Any]:
    """What the manifest says of a component's own source."""
    return {
        "id": part.id, "kind": part.kind, "revision": part.revision, "licence": part.licence,
        "files": {path: f.sha256 for path, f in part.files.items()},
    }  # fmt: skip
