"""A recipe that a build goes on with where it could not, or need not, keep to what was asked. It decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdcompile.recipe.compression import AcceptRecipe, QuantizeRecipe
from sdcompile.recipe.model import ComponentRecipe, Recipe
from sdcompile.recipe.stepcache import cached
from sdcompile.recipe.targets import TargetComponentRecipe
from sdcompile.spec import Precision


def in_precision(recipe: Recipe, component: str, precision: Precision, target: str = "") -> Recipe:
    """`recipe` with `component`, of one target or of the only one, built in `precision`."""
    # What stays in float32 of a cast means nothing where all of it does.
    return _changed(
        recipe, component, {"precision": precision, **({"cast": None} if precision == "fp32" else {})}, target
    )


def with_float(recipe: Recipe, component: str, groups: Sequence[str], target: str = "") -> Recipe:
    """`recipe` with `groups` of `component` left unquantized, and no more of them looked for."""
    quantize = recipe.by_target()[target].quantizing(component)
    told = {**quantize.params, "float_groups": [*quantize.params.get("float_groups", ()), *groups]}
    accept = quantize.accept_if.model_copy(update={"groups": False}) if quantize.accept_if else None
    changed = QuantizeRecipe(rest=quantize.rest, accept_if=accept, **told)
    return _changed(recipe, component, {"quantize": changed}, target)


def unpruned(recipe: Recipe, component: str) -> Recipe:
    """`recipe` with `component` as its source has it, for every target: what the model is, they share."""
    own = recipe.components[component].model_copy(update={"prune": {}})
    return recipe.model_copy(update={"components": {**recipe.components, component: own}})


def _changed(recipe: Recipe, component: str, change: Mapping[str, Any], target: str) -> Recipe:
    one = recipe.by_target()[target]
    for name, own in {component: change, **_pinned(one, component, change)}.items():
        recipe = _with(recipe, name, own, target)
    return recipe


def _pinned(recipe: Recipe, component: str, change: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What those that inherit from `component` (its widths, its shallow stand-in) have had of it so far.

    What was found of one model is not true of another.
    """
    heirs = [name for name, (base, _) in recipe.widths.items() if base == component]
    if component in recipe.components and recipe.components[component].step_cache is not None:
        heirs.append(cached(component))
    found = {}
    for name in heirs:
        quantize = recipe.quantizing(name)
        # Written out, so that nothing of it is inherited from what changes.
        accept = quantize.accept_if and AcceptRecipe(**quantize.accept_if.model_dump())
        told = {"rest": quantize.rest, "accept_if": accept, "float_groups": (), **quantize.params}
        had = {
            "precision": recipe.effective(name).precision, "cast": recipe.settings(name).cast,
            "quantize": QuantizeRecipe(**told),
        }  # fmt: skip
        found[name] = {key: had[key] for key in change}
    return found


def _with(recipe: Recipe, component: str, change: Mapping[str, Any], target: str) -> Recipe:
    if recipe.targets is None:
        own = recipe.components.get(component, ComponentRecipe()).model_copy(update=change)
        return recipe.model_copy(update={"components": {**recipe.components, component: own}})
    rows = []
    for row in recipe.targets:
        if row.name == target:
            mine = row.components.get(component, TargetComponentRecipe())
            # A copy made with `update` counts the field as set, which `in_target` goes by.
            mine = mine.model_copy(update=change)
            row = row.model_copy(update={"components": {**row.components, component: mine}})
        rows.append(row)
    return recipe.model_copy(update={"targets": tuple(rows)})
