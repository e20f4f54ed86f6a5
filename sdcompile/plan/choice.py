"""What one component is built with: backend, precision, passes; and why it cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from sdcompile.backends import BACKENDS, Backend
from sdcompile.families import Family
from sdcompile.passes import PASSES, casts, quantization
from sdcompile.plan.passing import Planned, faults_of_cast, faults_of_mode, place_of_quantize
from sdcompile.plan.passing import planned as planned_pass
from sdcompile.recipe import Recipe
from sdcompile.spec import Precision


class Choice(NamedTuple):
    """`params` are those of the torch module and the engine; `passes` stand in the order in which they run;
    `of_pruned` says that the checkpoint is another component's, which was pruned;
    `rest` is the precision of what int8 leaves unquantized, and `accept` what int8 must bring over it (None: nothing);
    `accept_pruned` is how many times as fast as unpruned it must be.
    """

    backend: Backend
    precision: Precision
    params: dict[str, Any]
    passes: tuple[Planned, ...]
    rest: Precision | None = None
    accept: Mapping[str, Any] | None = None
    of_pruned: bool = False
    accept_pruned: float | None = None

    @property
    def module_params(self) -> dict[str, Any]:
        """What building the torch module needs, but for the family."""
        return {k: v for k, v in self.params.items() if k not in ("options", "family", "rest")}

    @property
    def pruned(self) -> bool:
        """Is it another function than the source's, so that the defaults of a precision do not apply?"""
        return self.of_pruned or any(p.changes for p in self.passes)

    @property
    def unquantized(self) -> Choice:
        """The same in the precision `rest`, or as it is where nothing is quantized."""
        if self.rest is None:
            return self
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
    before = [planned_pass(PASSES[p], told) for p, told in recipe.pruning(family.denoiser).items() if p in PASSES]
    of_pruned = name == family.shallow and any(p.changes for p in before)
    pruning = {} if name == family.shallow else recipe.pruning(name)
    faults += [f"{recipe.place_of_pruning(name)}.{p}: unknown pass '{p}'" for p in pruning if p not in PASSES]
    if pruning and family.plain(name) != family.denoiser:
        faults.append(
            f"components.{name}.prune: passes of the prune stage are for {family.denoiser}; {name} has no attention "
            "heads, resnets or blocks they know"
        )
    passes = [planned_pass(PASSES[p], pruning[p]) for p in PASSES if p in pruning]
    accept_pruned = recipe.accepted_pruned(name) if pruning else None
    names = backend.realises.get(precision, ())
    quantizer, quantize = quantization(names), recipe.quantizing(name)
    told_cast = recipe.settings(name).cast
    casting = told_cast.params if told_cast else {}
    if precision == "bf16":
        # Its range is fp32's: what a component inherits of measuring overflow has no use.
        casting = {key: value for key, value in casting.items() if key == "keep_fp32"}

    def planned(passes: tuple[str, ...]) -> list[Planned]:
        made = []
        for record in (PASSES[p] for p in passes):
            told = {**backend.quantize, **quantize.params} if record is quantizer else casting if casts(record) else {}
            try:
                made.append(planned_pass(record, told))
            except ValidationError as error:
                # Right in each place, but what a component says does not fit what the recipe says.
                where = place_of_quantize(recipe, name)
                faults.extend(f"{where}: {row['msg'].removeprefix('Value error, ')}" for row in error.errors())
                made.append(planned_pass(record, {}))
        return made

    passes += planned(names)
    if quantizer is None:
        faults += faults_of_cast(recipe, name, backend, precision, passes)
        return Choice(backend, precision, params, tuple(passes), of_pruned=of_pruned, accept_pruned=accept_pruned)
    rest: Precision = quantize.rest or backend.rests[0]
    if rest not in backend.rests:
        where = f"components.{name}.quantize.rest" if own and own.quantize and own.quantize.rest else "quantize.rest"
        faults.append(f"{where}: beside int8, {backend.name} computes in {' or '.join(backend.rests)}, not in {rest}")
    passes += planned(backend.realises.get(rest, ()))
    faults += faults_of_mode(backend, passes, place_of_quantize(recipe, name))
    faults += faults_of_cast(recipe, name, backend, rest, passes)
    accept = quantize.accept_if.model_dump() if quantize.accept_if else None
    if accept is not None and accept["speedup"] is None:
        faults.append(f"{place_of_quantize(recipe, name)}.accept_if: what int8 must bring is not said: speedup: 1.05")
    elif accept is not None and accept["speedup"] == 0:
        accept["groups"] = False  # whatever it is, it is kept
    return Choice(backend, precision, {**params, "rest": rest}, tuple(passes), rest, accept, of_pruned, accept_pruned)
