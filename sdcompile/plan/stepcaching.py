"""Step caching in a plan: whether the recipe's can be built, and which settings each of the two engines takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdcompile.errors import RecipeError
from sdcompile.families import Family
from sdcompile.recipe import Recipe
from sdcompile.runtime.values import step_cache
from sdcompile.spec import ComponentSpec

DEPTH = "step_cache_depth"
"""The module parameter that makes a denoiser give its deep features, and its shallow stand-in take them."""


def specs_of(
    recipe: Recipe, family: Family, configs: Mapping[str, Any], specs: Mapping[str, ComponentSpec], faults: list[str]
) -> Mapping[str, ComponentSpec]:
    """The components' specs with step caching as `recipe` asks for it; adds to `faults` what cannot be."""
    if family.shallow in recipe.components and recipe.components[family.shallow].prune:
        faults.append(
            f"components.{family.shallow}.prune: it is cut from {family.denoiser}; prune that, and both are pruned"
        )
    found = recipe.settings(family.denoiser).step_cache
    if found is None:
        faults += _nothing_to_set(recipe, family)
        return specs
    where = f"components.{family.denoiser}"
    if "blocks" in recipe.pruning(family.denoiser):
        faults.append(f"{where}.prune.blocks: with step_cache no block can leave: its depth counts the model's layers")
    if "width" in recipe.pruning(family.denoiser):
        faults.append(
            f"{where}.prune.width: with step_cache no level can become narrower: the deep features that were recorded "
            "to judge the shallow engine by have the width of the source"
        )
    try:
        return family.step_cached(configs, specs, found.depth)
    except RecipeError as error:
        faults.append(f"{where}.{error.message}")
        return specs


def _nothing_to_set(recipe: Recipe, family: Family) -> list[str]:
    """Settings that speak to an engine which is not built."""
    why = f"no {family.shallow} is built: set components.{family.denoiser}.step_cache, as in {{every: 3}}"
    faults = [f"components.{family.shallow}: {why}"] if family.shallow in recipe.components else []
    if family.shallow in recipe.verify.floors:
        faults.append(f"verify.{family.shallow}: {why}")
    if step_cache(recipe.defaults.step_cache or "off") is not None:
        faults.append(f"defaults.step_cache: {why}")
    for name, options in (recipe.profiles or {}).items():
        if step_cache(options.get("step_cache") or "off") is not None:
            faults.append(f"profiles.{name}.step_cache: {why}")
    return faults


def plain(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a component's torch module as it is without step caching."""
    return {name: value for name, value in params.items() if name != DEPTH}


def defaults_of(recipe: Recipe, family: Family) -> dict[str, Any]:
    """Options of the bundle's defaults."""
    found = recipe.settings(family.denoiser).step_cache
    return {**({} if found is None else {"step_cache": found.every}), **recipe.defaults.options}
