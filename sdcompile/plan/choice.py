"""What one component is built with: backend, precision, passes; and why it cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sdcompile.backends import BACKENDS, Backend
from sdcompile.families import Family
from sdcompile.passes import PASSES, Pass, casts, quantization
from sdcompile.passes.base import Setting
from sdcompile.recipe import Recipe
from sdcompile.spec import Precision, Shapes


class Planned(NamedTuple):
    """A pass and everything its `run` is told of by the recipe, defaults included."""

    record: Pass
    params: dict[str, Any]

    @property
    def calibrates(self) -> bool:
        return self.record.calibrates(self.record.params.model_validate(self.params))

    @property
    def memory(self) -> tuple[float, float]:
        return (self.record.measuring if self.calibrates else None) or self.record.memory


class Choice(NamedTuple):
    """`params` are those of the torch module and the engine; `passes` stand in the order in which they run;
    `of_pruned` says that the checkpoint is another component's, which was pruned;
    `rest` is the precision of what int8 leaves unquantized, and `speedup` what int8 must bring over it (None: nothing).
    """

    backend: Backend
    precision: Precision
    params: dict[str, Any]
    passes: tuple[Planned, ...]
    rest: Precision | None = None
    speedup: float | None = None
    of_pruned: bool = False

    @property
    def module_params(self) -> dict[str, Any]:
        """What building the torch module needs, but for the family."""
        return {k: v for k, v in self.params.items() if k not in ("options", "family", "rest")}

    @property
    def pruned(self) -> bool:
        """Is it another function than the source's, so that the defaults of a precision do not apply?"""
        return self.of_pruned or any(p.record.stage == "prune" and not p.record.exact for p in self.passes)

    @property
    def unquantized(self) -> Choice:
        """The same in the precision `rest`."""
        assert self.rest is not None
        kept = [
            p for p in self.passes if p.record.stage == "prune" or p.record.name in self.backend.realises[self.rest]
        ]
        params = {k: v for k, v in self.params.items() if k != "rest"}
        return Choice(self.backend, self.rest, params, tuple(kept), of_pruned=self.of_pruned)

    @property
    def calibrates(self) -> bool:
        return any(p.calibrates for p in self.passes)

    @property
    def export(self) -> Mapping[str, Any]:
        """What its backend, with its options, asks of the ONNX exporter."""
        return self.backend.export(self.backend.options.model_validate(self.params["options"]))

    @property
    def opset(self) -> int:
        """The oldest ONNX opset that every pass can write."""
        return max((p.record.opset for p in self.passes), default=0)


def choose(recipe: Recipe, family: Family, configs: Mapping[str, Any], name: str, faults: list[str]) -> Choice:
    """What `name` is built with; adds to `faults` what cannot be."""
    chosen = recipe.effective(name)
    backend, precision = BACKENDS[chosen.backend], chosen.precision
    own = recipe.components.get(name)
    if precision not in backend.realises:
        where = f"components.{name}.precision" if own and own.precision else "precision"
        faults.append(
            f"{where}: {backend.name} cannot make {precision} of {name}: it makes {', '.join(backend.realises)}"
        )
    folder = family.folder(name, configs)
    quantized = configs.get(folder, {}).get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else quantized
        where, what = (
            ("source", f"its {folder}") if folder in family.folders.values() else (f"components.{name}.source", "it")
        )
        faults.append(f"{where}: {what} is already quantized ({method}); name the original weights")
    options = backend.options(**chosen.build)
    faults += [f"components.{name}.build: {fault}" for fault in backend.refuses(precision, options)]
    params = {"family": family.name, "options": options.model_dump(mode="json"), **chosen.params}
    # A shallow stand-in is cut from the denoiser's checkpoint, after the denoiser's pruning.
    before = [PASSES[p] for p in recipe.pruning(family.denoiser) if p in PASSES]
    of_pruned = name == family.shallow and any(not record.exact for record in before)
    pruning = {} if name == family.shallow else recipe.pruning(name)
    faults += [f"components.{name}.prune.{p}: unknown pass '{p}'" for p in pruning if p not in PASSES]
    if pruning and name != family.denoiser:
        faults.append(
            f"components.{name}.prune: passes of the prune stage are for {family.denoiser}; {name} has no attention "
            "heads, resnets or blocks they know"
        )
    passes = [_planned(PASSES[p], pruning[p]) for p in PASSES if p in pruning]
    names = backend.realises.get(precision, ())
    quantizer, quantize = quantization(names), recipe.quantizing(name)
    told_cast = recipe.settings(name).cast
    casting = told_cast.params if told_cast else {}
    if precision == "bf16":
        # Its range is fp32's: what a component inherits of measuring overflow has no use.
        casting = {key: value for key, value in casting.items() if key == "keep_fp32"}

    def planned(passes: tuple[str, ...]) -> list[Planned]:
        told = {p: {**backend.quantize, **quantize.params} if PASSES[p] is quantizer else {} for p in passes}
        return [_planned(PASSES[p], casting if casts(PASSES[p]) else told[p]) for p in passes]

    passes += planned(names)
    if quantizer is None:
        faults += _faults_of_cast(recipe, name, backend, precision, passes)
        return Choice(backend, precision, params, tuple(passes), of_pruned=of_pruned)
    rest: Precision = quantize.rest or backend.rests[0]
    if rest not in backend.rests:
        where = f"components.{name}.quantize.rest" if own and own.quantize and own.quantize.rest else "quantize.rest"
        faults.append(f"{where}: beside int8, {backend.name} computes in {' or '.join(backend.rests)}, not in {rest}")
    passes += planned(backend.realises.get(rest, ()))
    faults += _faults_of_cast(recipe, name, backend, rest, passes)
    speedup = quantize.accept_if.speedup if quantize.accept_if else None
    return Choice(backend, precision, {**params, "rest": rest}, tuple(passes), rest, speedup, of_pruned)


def _faults_of_cast(
    recipe: Recipe, name: str, backend: Backend, precision: Precision, passes: list[Planned]
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


def faults_of_passes(
    name: str, choice: Choice, config: Mapping[str, Any], shapes: Shapes, multiples: Mapping[str, int]
) -> list[str]:
    """What the passes of the prune stage refuse of this component's config and sizes."""
    faults: list[str] = []
    before: dict[str, Any] = {}
    for planned in (p for p in choice.passes if p.record.stage == "prune"):
        record, params = planned.record, planned.record.params.model_validate(planned.params)
        found = record.refuses(params, Setting(config, shapes, multiples, dict(before)))
        faults += [f"components.{name}.prune.{record.name}.{fault}" for fault in found]
        before[record.name] = params
    return faults


def _planned(record: Pass, params: Mapping[str, Any]) -> Planned:
    given = {key: value for key, value in params.items() if value is not None}
    return Planned(record, record.params.model_validate(given).model_dump(mode="json"))
