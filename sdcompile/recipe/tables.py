"""Faults against the tables of this installation: unknown components, fields no component has, options of
backends and parameters of passes. It works on the data as written, so that every fault has a place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from sdcompile.recipe.compression import ACCEPT_IF, PruneAcceptRecipe, QuantizeRecipe
from sdcompile.recipe.fields import did_you_mean
from sdcompile.recipe.known import Known
from sdcompile.recipe.sections import VerifyRecipe
from sdcompile.recipe.stepcache import base_of
from sdcompile.recipe.targets import CAPABILITIES, TargetVerifyRecipe, spelled_out, target_faults
from sdcompile.recipe.widths import widths_of
from sdcompile.recipe.words import words
from sdcompile.recipe.yamltext import Place

Faults = Iterator[tuple[Place, str]]

SOME_HAVE = {
    "clip_skip": "clip_skip",
    "source": "source of its own",
    "step_cache": "steps to cache",
    "widths": "widths",
}
"""Fields that only some components understand (`Family.fields`), in words."""


def is_unknown_name(data: Mapping[str, Any], known: Known, place: Place) -> bool:
    """True where `table_faults` speaks of this place in better words."""
    names = _components(data, known)
    if names is None or len(place) < 2:
        return False
    fields = VerifyRecipe.model_fields if place[0] == "verify" else ()
    if place[0] == "targets":
        known_here = TargetVerifyRecipe.model_fields if place[2:3] == ("verify",) else ()
        named = len(place) > 3 and place[2] in ("components", "verify")
        return named and place[3] not in names and place[3] not in known_here
    return place[0] in ("components", "verify") and place[1] not in names and place[1] not in fields


def table_faults(data: Mapping[str, Any], known: Known) -> Faults:
    names = _components(data, known)
    components = _mapping(data.get("components"))
    if names is not None:
        yield from _name_faults(names, components, _mapping(data.get("verify")))
    top = data.get("backend")
    yield from target_faults(data)
    yield from _option_faults(("build",), _at(known.backends, top), data.get("build"))
    targets = _targets(data)
    for place, target in targets:
        yield from _faults_of_target(place, target, known, names)
    ways = [_laid_over(data, target) for _, target in targets] or [data]
    for name, own in components.items():
        if not isinstance(own, dict):
            continue
        here: Place = ("components", name)
        yield from _option_faults((*here, "build"), _at(known.backends, own.get("backend") or top), own.get("build"))
        yield from _prune_faults((*here, "prune"), known, _mapping(own.get("prune")), accept=True)
        for width, passes in _mapping(own.get("widths")).items():
            yield from _prune_faults((*here, "widths", width), known, _mapping(passes))
        yield from _quantize_faults((*here, "quantize"), known, own.get("quantize"), _chosen(ways, name), name)
    for place, target in targets:
        for name, own in _mapping(target.get("components")).items():
            chosen = _chosen([_laid_over(data, target)], name)
            here = (*place, "components", name, "quantize")
            yield from _quantize_faults(here, known, _mapping(own).get("quantize"), chosen, name)
    everyone = [row for name in dict.fromkeys((*(names or ()), *components)) for row in _chosen(ways, name)]
    yield from _quantize_faults(("quantize",), known, data.get("quantize"), everyone, "no component")


def _targets(data: Mapping[str, Any]) -> list[tuple[Place, Mapping[str, Any]]]:
    """Every target that can be read as one, spelled out, and its place."""
    written = data.get("targets")
    rows = enumerate(map(spelled_out, written if isinstance(written, list) else ()))
    return [(("targets", index), row) for index, row in rows if isinstance(row, dict)]


def _laid_over(data: Mapping[str, Any], target: Mapping[str, Any]) -> Mapping[str, Any]:
    """As much of the recipe of one target alone as tells backends and precisions."""
    components, own = _mapping(data.get("components")), _mapping(target.get("components"))
    merged = {name: {**_set(components.get(name)), **_set(own.get(name))} for name in (*components, *own)}
    return {
        "backend": target.get("backend"), "precision": target.get("precision") or data.get("precision"),
        "components": merged,
    }  # fmt: skip


def _set(value: Any) -> dict[str, Any]:
    return {key: item for key, item in _mapping(value).items() if item is not None}


def _faults_of_target(place: Place, target: Mapping[str, Any], known: Known, names: Mapping[str, Any] | None) -> Faults:
    backend, build = target.get("backend"), target.get("build")
    options = _at(known.backends, backend)
    if options is not None and CAPABILITIES in _mapping(build) and CAPABILITIES not in options.model_fields:
        build = {key: value for key, value in _mapping(build).items() if key != CAPABILITIES}
        takers = [name for name, model in known.backends.items() if model and CAPABILITIES in model.model_fields]
        yield place, f"{backend} takes no compute capability; {', '.join(takers) or 'no backend'} does"
    yield from _option_faults((*place, "build"), options, build)
    for name in _mapping(target.get("verify")):
        if names is not None and name not in names and name not in TargetVerifyRecipe.model_fields:
            near = did_you_mean(name, (*TargetVerifyRecipe.model_fields, *names))
            yield (*place, "verify", name), f"unknown field '{name}'{near}"
    for name, own in _mapping(target.get("components")).items():
        here: Place = (*place, "components", name)
        if names is not None and name not in names:
            yield here, f"unknown component '{name}'{did_you_mean(name, names)}"
        model = _at(known.backends, _mapping(own).get("backend") or backend)
        yield from _option_faults((*here, "build"), model, _mapping(own).get("build"))


def _components(data: Mapping[str, Any], known: Known) -> dict[str, tuple[str, ...]] | None:
    """The components of this family, and the widths the recipe adds; of all families where the family is a fault."""
    family, families = data.get("family"), known.families
    if isinstance(family, str) and family in families:
        named = dict(families[family])
    else:
        named = {name: fields for components in families.values() for name, fields in components.items()}
    widths = {name: () for name, base, _ in widths_of(_mapping(data.get("components"))) if base in named}
    return {**widths, **named} or None


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


def _prune_faults(place: Place, known: Known, passes: Mapping[str, Any], *, accept: bool = False) -> Faults:
    models: dict[str, type[BaseModel]] = {**known.prune, **({ACCEPT_IF: PruneAcceptRecipe} if accept else {})}
    if accept and set(passes) == {ACCEPT_IF}:
        yield (*place, ACCEPT_IF), "no pass is named whose engine could be accepted or not"
    for name, params in passes.items():
        if name == ACCEPT_IF and not accept:
            yield (*place, name), "a width is built because it is narrow; accept_if is for `prune`"
        elif known.prune and name not in models:
            yield (*place, name), f"unknown pass '{name}'{did_you_mean(name, models)}"
        else:
            yield from _option_faults((*place, name), models.get(name), params)


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


def _chosen(ways: list[Any], name: str) -> list[tuple[Any, Any]]:
    """(backend, precision) of component `name` in each of `ways`: a recipe, or each target laid over it."""
    found = []
    for way in ways:
        components = _mapping(way.get("components"))
        full = {width: base for width, base, _ in widths_of(components)}.get(name) or base_of(name) or name
        own = {**_set(components.get(full)), **_set(components.get(name))}
        backend = own.get("backend") or way.get("backend")
        found.append((backend, own.get("precision") or way.get("precision") or "fp32"))
    return found


def _option_faults(place: Place, model: type[BaseModel] | None, options: Any, beside: tuple[str, ...] = ()) -> Faults:
    """Faults of `options` against `model`; `beside` are fields that may stand beside the model's own."""
    if model is None or not isinstance(options, dict):
        return
    try:
        model.model_validate({key: value for key, value in options.items() if value is not None})
    except ValidationError as error:
        for item in error.errors(include_url=False):
            if item["type"] == "too_short" and item["input"]:
                continue  # only sound entries are counted, and the faulty ones are told of anyway
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
