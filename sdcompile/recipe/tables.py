"""Faults against the tables of this installation: unknown components, fields no component has, options of
backends and parameters of passes. It works on the data as written, so that every fault has a place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from sdcompile.recipe.compression import QuantizeRecipe
from sdcompile.recipe.fields import did_you_mean
from sdcompile.recipe.known import Known
from sdcompile.recipe.sections import VerifyRecipe
from sdcompile.recipe.stepcache import base_of
from sdcompile.recipe.words import words
from sdcompile.recipe.yamltext import Place

Faults = Iterator[tuple[Place, str]]

SOME_HAVE = {"clip_skip": "clip_skip", "source": "source of its own"}
"""Fields that only some components understand (`Family.fields`), in words."""


def is_unknown_name(data: Mapping[str, Any], known: Known, place: Place) -> bool:
    """True where `table_faults` speaks of this place in better words."""
    names = _components(data, known)
    if names is None or len(place) < 2:
        return False
    fields = VerifyRecipe.model_fields if place[0] == "verify" else ()
    return place[0] in ("components", "verify") and place[1] not in names and place[1] not in fields


def table_faults(data: Mapping[str, Any], known: Known) -> Faults:
    names = _components(data, known)
    components = _mapping(data.get("components"))
    if names is not None:
        yield from _name_faults(names, components, _mapping(data.get("verify")))
    top = data.get("backend")
    yield from _option_faults(("build",), _at(known.backends, top), data.get("build"))
    for name, own in components.items():
        if not isinstance(own, dict):
            continue
        here: Place = ("components", name)
        yield from _option_faults((*here, "build"), _at(known.backends, own.get("backend") or top), own.get("build"))
        yield from _prune_faults((*here, "prune"), known, _mapping(own.get("prune")))
        inherited = {**_mapping(components.get(base_of(name) or name)), **own}
        yield from _quantize_faults((*here, "quantize"), known, own.get("quantize"), [_chosen(data, inherited)], name)
    everyone = [_chosen(data, _mapping(components.get(name))) for name in dict.fromkeys((*(names or ()), *components))]
    yield from _quantize_faults(("quantize",), known, data.get("quantize"), everyone, "no component")


def _components(data: Mapping[str, Any], known: Known) -> dict[str, tuple[str, ...]] | None:
    """The components of this family; of all families where the family is itself a fault."""
    family, families = data.get("family"), known.families
    if isinstance(family, str) and family in families:
        return dict(families[family])
    return {name: fields for components in families.values() for name, fields in components.items()} or None


def _name_faults(names: Mapping[str, tuple[str, ...]], components: Mapping[str, Any], verify: Any) -> Faults:
    """Names of components, and fields a component does not understand."""
    for name, own in components.items():
        if name not in names:
            yield ("components", name), f"unknown component '{name}'{did_you_mean(name, names)}"
            continue
        for field, words_of_it in SOME_HAVE.items() if isinstance(own, dict) else ():
            if own.get(field) is not None and field not in names[name]:
                takers = [c for c, fields in names.items() if field in fields]
                yield (
                    ("components", name, field),
                    f"{name} has no {words_of_it}; it belongs to {', '.join(takers) or 'no component'}",
                )
    for name in verify:
        if name not in names and name not in VerifyRecipe.model_fields:
            yield ("verify", name), f"unknown field '{name}'{did_you_mean(name, (*VerifyRecipe.model_fields, *names))}"


def _prune_faults(place: Place, known: Known, passes: Mapping[str, Any]) -> Faults:
    for name, params in passes.items():
        if known.prune and name not in known.prune:
            yield (*place, name), f"unknown pass '{name}'{did_you_mean(name, known.prune)}"
        else:
            yield from _option_faults((*place, name), known.prune.get(name), params)


def _quantize_faults(place: Place, known: Known, data: Any, chosen: list[tuple[Any, Any]], who: str) -> Faults:
    """Parameters of the pass that quantizes to each (backend, precision) of `chosen`."""
    if not isinstance(data, dict) or not known.quantize:
        return
    found = [_at(_at(known.quantize, backend) or {}, precision) for backend, precision in chosen]
    models = dict.fromkeys(model for model in found if model is not None)
    if not models:
        takers = ", ".join(f"{b} ({', '.join(row)})" for b, row in known.quantize.items() if row)
        backend, precision = chosen[0]
        own = f"{who} is quantized" if who == "no component" else f"{who} is built in {precision} on {backend}"
        yield place, f"{own}, so that this speaks to nothing; what quantizes: {takers or 'nothing installed'}"
    params = {key: value for key, value in data.items() if key not in QuantizeRecipe.model_fields}
    for model in models:
        yield from _option_faults(place, model, params, tuple(QuantizeRecipe.model_fields))


def _chosen(data: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[Any, Any]:
    return own.get("backend") or data.get("backend"), own.get("precision") or data.get("precision") or "fp32"


def _option_faults(place: Place, model: type[BaseModel] | None, options: Any, beside: tuple[str, ...] = ()) -> Faults:
    """Faults of `options` against `model`; `beside` are fields that may stand beside the model's own."""
    if model is None or not isinstance(options, dict):
        return
    try:
        model.model_validate({key: value for key, value in options.items() if value is not None})
    except ValidationError as error:
        for item in error.errors(include_url=False):
            where = (*place, *item["loc"])
            holder = _holder(model, item["loc"])
            fields = (*holder.model_fields, *(beside if holder is model else ()))
            yield where, words(item, where, fields)


def _holder(model: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The model, inside `model`, that has the field at the end of `loc`."""
    for key in loc[:-1]:
        field = model.model_fields.get(str(key))
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return model


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _at(table: Mapping[str, Any], name: Any) -> Any:
    return table.get(name) if isinstance(name, str) else None
