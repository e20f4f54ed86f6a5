"""pydantic's errors in the words of a person who writes recipes."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

from sdcompile.recipe.compression import AcceptRecipe, CalibrateRecipe, CastRecipe, QuantizeRecipe
from sdcompile.recipe.fields import did_you_mean, shown
from sdcompile.recipe.model import ComponentRecipe, Recipe
from sdcompile.recipe.sections import DefaultsRecipe, FloorRecipe, ShapesRecipe, VerifyRecipe
from sdcompile.recipe.stepcache import StepCacheRecipe
from sdcompile.recipe.targets import TargetComponentRecipe, TargetRecipe, TargetVerifyRecipe
from sdcompile.recipe.yamltext import Place
from sdcompile.spec import PRECISIONS

_SECTIONS: dict[str, type[BaseModel]] = {
    "shapes": ShapesRecipe,
    "defaults": DefaultsRecipe,
    "verify": VerifyRecipe,
    "calibrate": CalibrateRecipe,
    "quantize": QuantizeRecipe,
    "cast": CastRecipe,
    "accept_if": AcceptRecipe,
    "step_cache": StepCacheRecipe,
}


def words(item: Any, place: Place, fields: tuple[str, ...] | None = None) -> str:
    """One pydantic error in our words. `fields`: those there are at `place`, when it is no part of a recipe's own."""
    kind, value, key = item["type"], item.get("input"), str(place[-1]) if place else ""
    if kind == "missing":
        return f"missing field '{key}'"
    if kind == "extra_forbidden":
        return f"unknown field '{key}'{did_you_mean(key, fields if fields is not None else _siblings(place))}"
    if kind == "sdcompile":
        return str(item["ctx"]["text"])
    if kind == "value_error":
        return str(item["ctx"]["error"])
    if kind == "literal_error":
        if place == ("version",):
            return f"this sdcompile reads recipes of version 1, got {shown(value)}"
        choices = (
            PRECISIONS if key == "precision" else tuple(re.findall(r"[^\s',]+(?=')|\b\d+\b", item["ctx"]["expected"]))
        )
        near = did_you_mean(value, choices) if isinstance(value, str) else ""
        return f"{shown(value)} is not one of {', '.join(choices)}{near if near.endswith('?') else ''}"
    limits = {
        "greater_than_equal": ("ge", "at least"),
        "less_than_equal": ("le", "at most"),
        "greater_than": ("gt", "more than"),
        "less_than": ("lt", "less than"),
    }
    if kind in limits:
        name, words = limits[kind]
        return f"{shown(value)} is out of range: it must be {words} {item['ctx'][name]}"
    if kind == "too_short":
        return "expected at least one entry"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"expected a mapping, got {kind_of(value)}"
    if kind in ("tuple_type", "list_type"):
        return f"expected a list, got {kind_of(value)}"
    return f"{item['msg'][:1].lower()}{item['msg'][1:]}, got {shown(value)}"


def _siblings(place: Place) -> tuple[str, ...]:
    """The fields of the nearest section around `place`."""
    if len(place) == 1:
        return tuple(Recipe.model_fields)
    if place[0] == "verify" and len(place) == 3:
        return tuple(FloorRecipe.model_fields)
    if place[0] == "targets" and place[2:3] == ("verify",):
        return tuple((FloorRecipe if len(place) == 5 else TargetVerifyRecipe).model_fields)
    section = next((_SECTIONS[str(key)] for key in reversed(place[:-1]) if str(key) in _SECTIONS), None)
    if section is None and place[0] == "components":
        section = ComponentRecipe
    if section is None and place[0] == "targets":
        section = TargetComponentRecipe if "components" in place[:-1] else TargetRecipe
    return tuple(section.model_fields) if section else ()


def kind_of(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return names.get(type(value)) or shown(value)
