"""Widths of a denoiser in a plan: what each is a width of, and what cannot be asked of them."""

from __future__ import annotations

from collections.abc import Mapping

from sdcompile.families import Family
from sdcompile.plan.choice import Choice
from sdcompile.recipe import Recipe
from sdcompile.runtime.offer import unknown_width
from sdcompile.spec import FULL, ComponentSpec


def specs_of(recipe: Recipe, specs: Mapping[str, ComponentSpec], faults: list[str]) -> Mapping[str, ComponentSpec]:
    """The components' specs with those of every width, which takes and gives what the full one does.

    Adds to `faults` what the recipe asks of widths and cannot be.
    """
    found = {name: base for name, (base, _) in recipe.widths.items() if base in specs}
    for name, base in found.items():
        place = recipe.place_of_pruning(name)
        if name in specs:
            faults.append(f"{place}: {name} is a component of this family; give the width another name")
        if name in recipe.components and recipe.components[name].prune:
            faults.append(f"components.{name}.prune: its passes are those of {place}; write them there")
        if recipe.settings(base).step_cache is not None:
            faults.append(
                f"{place}: with step_cache each width would need a shallow stand-in of its own; leave one of them out"
            )
    faults += _unknown(recipe)
    return {**{name: specs[base] for name, base in found.items()}, **specs}


def _unknown(recipe: Recipe) -> list[str]:
    """Options among the defaults and profiles that name a width which is not built."""
    built = widths(recipe)
    asked = {"defaults": recipe.defaults.unet_width}
    asked |= {f"profiles.{name}": options.get("unet_width") for name, options in (recipe.profiles or {}).items()}
    return [
        f"{place}.unet_width: {unknown_width(name, built)}"
        for place, name in asked.items()
        if name is not None and name not in built
    ]


def widths(recipe: Recipe) -> tuple[str, ...]:
    """The widths the recipe builds, in the order written, the full one first."""
    return (FULL, *(width for _, width in recipe.widths.values()))


def without(family: Family, chosen: Mapping[str, Choice]) -> dict[str, Choice]:
    """Those of `chosen` that are no further width of the denoiser: what whole images are verified with."""
    return {name: choice for name, choice in chosen.items() if family.plain(name) == name}
