"""The passes of one component as a plan holds them, and what cannot be asked of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sdcompile.backends import BACKENDS, Backend
from sdcompile.passes import PASSES, Pass, casts
from sdcompile.passes.base import Setting
from sdcompile.recipe import Recipe
from sdcompile.spec import Precision


class Planned(NamedTuple):
    """A pass and everything its `run` is told of by the recipe, defaults included."""

    record: Pass
    params: dict[str, Any]

    @property
    def calibrates(self) -> bool:
        return self.record.calibrates(self.record.params.model_validate(self.params))

    @property
    def wants(self) -> tuple[str, ...]:
        return self.record.wants(self.record.params.model_validate(self.params))

    @property
    def changes(self) -> bool:
        """Does the module compute another function after it than before?"""
        record = self.record
        return record.stage == "prune" and not (record.exact or record.idle(record.params.model_validate(self.params)))

    def memory(self, setting: Setting) -> tuple[float, float]:
        params = self.record.params.model_validate(self.params)
        usual = self.record.memory(params, setting) if callable(self.record.memory) else self.record.memory
        times, gib = (self.record.measuring if self.calibrates else None) or usual
        return times, gib + self.record.working(params, setting)

    def disk(self, setting: Setting) -> float:
        found = self.record.disk
        return found(self.record.params.model_validate(self.params), setting) if callable(found) else found


def planned(record: Pass, params: Mapping[str, Any]) -> Planned:
    """`record` with what a recipe tells it; raises ValidationError where that does not fit together."""
    given = {key: value for key, value in params.items() if value is not None}
    return Planned(record, record.params.model_validate(given).model_dump(mode="json"))


def place_of_quantize(recipe: Recipe, name: str) -> str:
    """Where the quantization of a component is written: of its own, or of the recipe."""
    own = recipe.components.get(name)
    return f"components.{name}.quantize" if own and own.quantize else "quantize"


def faults_of_passes(recipe: Recipe, name: str, passes: Sequence[Planned], setting: Setting) -> list[str]:
    """What the passes refuse of this component: its modules, its config, its sizes, and each other."""
    faults: list[str] = []
    for record, told in passes:
        params = record.params.model_validate(told)
        pruning = f"{recipe.place_of_pruning(name)}.{record.name}"
        where = pruning if record.stage == "prune" else place_of_quantize(recipe, name)
        faults += [f"{where}.{fault}" for fault in record.refuses(params, setting)]
        setting = replace(setting, before={**setting.before, record.name: params})
    return faults


def faults_of_mode(backend: Backend, passes: Sequence[Planned], where: str) -> list[str]:
    """Ways of quantizing that the backend has no kernels for."""
    told = next((params for _, params in passes if "mode" in params), None)
    if told is None or told["bits"] in backend.modes.get(told["mode"], ()):
        return []
    mode, bits = told["mode"], told["bits"]
    if mode not in backend.modes:
        return [f"{where}.mode: {backend.name} has nothing faster for '{mode}'; it takes {', '.join(backend.modes)}"]
    return [f"{where}.bits: {backend.name} has no kernels for weights of {bits} bits"]


def faults_of_cast(
    recipe: Recipe, name: str, backend: Backend, precision: Precision, passes: Sequence[Planned]
) -> list[str]:
    """What `cast:` of the component says to nobody, and an opset the cast cannot be written in."""
    found = next((p.record for p in passes if casts(p.record)), None)
    own = recipe.components.get(name)
    faults = []
    if own and own.cast and found is None:
        takers = ", ".join(
            b.name for b in BACKENDS.values() if any(casts(PASSES[p]) for row in b.realises.values() for p in row)
        )
        why = "fp32 is not cast" if precision == "fp32" else f"{backend.name} makes {precision} by itself"
        faults.append(f"components.{name}.cast: {why}, so that this speaks to nothing; backends that cast: {takers}")
    if own and own.cast and own.cast.from_samples and precision == "bf16" and found is not None:
        faults.append(
            f"components.{name}.cast.from_samples: bf16 has the range of fp32, so that nothing overflows in it"
        )
    if found is not None and recipe.opset < found.opset and "opset" in recipe.model_fields_set:
        faults.append(
            f"opset: {precision} of {name} needs opset {found.opset} or later, whose operators take it; this is "
            f"{recipe.opset}"
        )
    return faults
