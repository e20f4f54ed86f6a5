"""How a build goes on after a race of `accept_if`: with which recipe, and what is told of it. It races nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sdcompile.recipe import Recipe
from sdcompile.recipe.changes import in_precision, unpruned, with_float
from sdcompile.spec import at_target


class Detour(NamedTuple):
    """A recipe in the place of the one asked for, and why.

    name    the component (of one target: unet@openvino) that is not built as asked
    about   "prune" or "precision": a later note about the same takes the place of this one
    """

    recipe: Recipe
    name: str
    about: str
    note: str


def without_loser(recipe: Recipe, race: Mapping[str, Any], target: str, won: Recipe | None) -> Detour:
    """Unpruned, in all targets, as they share the model; or unquantized, in one.

    `won` is the recipe in which all of the component had won in int8, before groups of layers were left in float.
    """
    component, name = race["component"], at_target(race["component"], target)
    measured = f"{race['speedup']:.2f} times as fast, and accept_if wants {race['wanted']:g}"
    if race["of"] == "prune":
        note = f"pruning is left out, because it does not win here: pruned it is {measured}"
        return Detour(unpruned(recipe, component), component, "prune", note)
    int8, rest = race["name"], race["rival"]
    if won is not None:
        note = f"all of it is {int8}, as it no longer wins here with groups of layers in {rest}: it is {measured}"
        return Detour(won, name, "precision", note)
    note = f"asked for {int8}, built in {rest}, because {int8} does not win here: it is {measured}"
    return Detour(in_precision(recipe, component, rest, target), name, "precision", note)


def with_slower_in_float(recipe: Recipe, race: Mapping[str, Any], target: str) -> Detour:
    """The groups of layers unquantized that take longer in int8."""
    component, groups = race["component"], race["slower"]
    int8, rest = (sum(race["groups"][group][k] for group in groups) for k in range(2))
    some = ", ".join(groups[:3]) + (f" and {len(groups) - 3} more" if len(groups) > 3 else "")
    note = (
        f"{len(groups)} of {len(race['groups'])} groups of layers stay in {race['rival']}, where they take {rest:.3g} "
        f"ms of a call and in {race['name']} {int8:.3g} here: {some}"
    )
    changed = with_float(recipe, component, groups, target)
    return Detour(changed, at_target(component, target), "precision", note)
