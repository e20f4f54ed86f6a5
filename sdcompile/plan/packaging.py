"""The last step: what the bundle is told of how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from sdcompile.plan import stepcaching
from sdcompile.plan.choice import Choice
from sdcompile.plan.draft import Draft, Road
from sdcompile.plan.sampling import profiles
from sdcompile.plan.verification import default_size
from sdcompile.recipe import Recipe, dump
from sdcompile.spec import PIPELINE, Shapes, at_target
from sdcompile.store import key_of

if TYPE_CHECKING:
    from sdcompile.steps.layout import Source


class Way(NamedTuple):
    """One target of a recipe laid out: component -> choice, road, report step, and the step that tells passes apart."""

    chosen: Mapping[str, Choice]
    roads: Mapping[str, Road]
    reports: Mapping[str, str]
    apart: Mapping[str, str] = MappingProxyType({})


def package(
    draft: Draft,
    recipe: Recipe,
    ways: Mapping[str, Way],
    facts: Mapping[str, Any],
    shapes: Shapes,
    shared: Mapping[str, str],
    fallbacks: Mapping[str, str],
) -> None:
    """The bundle. ways: target ("" where there is one for all) -> how it is made; shared: tokenizer and tables."""
    source = draft.source
    components = {target: _components(draft, way) for target, way in ways.items()}
    params = {
        # What the source is, not where it lies: a path would tie the bundle to a machine.
        "recipe": _recipe(recipe, source),
        "source": {
            "id": source.id, "kind": source.kind, "revision": source.revision, "licence": source.licence,
            "files": {path: f.sha256 for path, f in source.files.items()},
            **({"components": {name: _origin(part) for name, part in source.parts.items()}} if source.parts else {}),
            **({"pictures": _digest(source.pictures)} if source.pictures else {}),
        },
        "facts": facts,
        "fallbacks": dict(fallbacks),
        **({"components": components[""]} if "" in components else {"targets": components}),
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
    inputs: dict[str, str] = {}
    for target, way in ways.items():
        for name, road in way.roads.items():
            label = at_target(name, target)
            inputs[f"engine.{label}"] = road.engine
            inputs |= {f"pass.{label}.{draft.steps[step].op}": step for step in road.passes}
            inputs |= {f"race.{label}.{stage}": step for stage, step in road.races.items()}
        inputs |= {f"report.{at_target(name, target)}": step for name, step in way.reports.items()}
        inputs |= {f"apart.{at_target(name, target)}": step for name, step in way.apart.items()}
    draft.add(PIPELINE, "bundle", {**inputs, **shared}, params, shapes=shapes, disk=4 << 20)


def _components(draft: Draft, way: Way) -> dict[str, dict[str, Any]]:
    """What the manifest is told of each component, but for what its report says."""
    return {
        name: {"backend": choice.backend.name, "precision": choice.precision, "params": choice.params,
               "spec": draft.steps[way.roads[name].engine].parts["spec"],
               "passes": [draft.steps[step].op for step in way.roads[name].passes]}
        for name, choice in way.chosen.items()
    }  # fmt: skip


def _recipe(recipe: Recipe, source: Source) -> dict[str, Any]:
    data = {**dump(recipe), "source": source.id}
    if source.pictures:
        data["calibrate"] = {**data["calibrate"], "pictures": source.pictures.id}
    own = {name: {**data["components"][name], "source": part.id} for name, part in source.parts.items()}
    return {**data, "components": {**data["components"], **own}} if own else data


def _digest(pictures: Source) -> dict[str, Any]:
    """What the manifest says of pictures, of which there may be thousands: their names and bytes in one hash."""
    files = {path: f.sha256 for path, f in pictures.files.items()}
    return {"id": pictures.id, "files": len(files), "sha256": key_of(files)}


def _origin(part: Source) -> dict[str, Any]:
    """What the manifest says of a component's own source."""
    return {
        "id": part.id, "kind": part.kind, "revision": part.revision, "licence": part.licence,
        "files": {path: f.sha256 for path, f in part.files.items()},
    }  # fmt: skip
