"""Laying out steps one by one: each gets the keys of its inputs, its versions and its obstacle on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from sdcompile.backends import BACKENDS
from sdcompile.families import Family
from sdcompile.passes import PASSES
from sdcompile.plan.steps import SOURCE, Machine, Step
from sdcompile.spec import ComponentSpec, Job, Kind, Shapes, Stage
from sdcompile.steps import OPS
from sdcompile.store import key_of

if TYPE_CHECKING:
    from sdcompile.steps.layout import Source


class Road(NamedTuple):
    """Steps of one component, by name.

    forms   the last step of each form: {"checkpoint": ...}, and {"onnx": ...} where the engine is made of one
    passes  the passes, in order
    plain   the exported ONNX that no pass has touched
    races   those against the same unquantized, unpruned, where a stage must win: {"quantize": ..., "prune": ...}
    stations  lays out an engine before and after each pass: (pass, the engine after it), the first ("", before any)
    """

    forms: dict[str, str]
    passes: tuple[str, ...]
    engine: str
    plain: str | None = None
    races: Mapping[str, str] = MappingProxyType({})
    stations: Callable[[], list[tuple[str, str]]] = list


_SHARED_STAGES = frozenset({"fetch", "prune", "export", "calibrate"})
_SHARED_KINDS = frozenset({"samples", "tokenizer", "tables"})


@dataclass
class Draft:
    """Steps being laid out; turns names of inputs into keys as it goes.

    Where a recipe has several targets, `target` is the one being laid out. A step that is already there, with
    the same key, is not laid out again, whoever asked for it first.
    """

    family: Family
    source: Source
    machine: Machine
    steps: dict[str, Step] = field(default_factory=dict)
    target: str = ""

    def folder(self, component: str) -> str:
        """The source's folder that `component` is made of, which is also its checkpoint's name."""
        return self.family.folder(component, self.source.parts)

    def without_parts(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` (inputs by folder, or facts) as they are without components from sources of their own.

        For steps that run whole pictures for what the denoiser does in them, and need no decoder but the model's.
        """
        return {name: value for name, value in values.items() if name not in (*self.source.parts, "decoder")}

    def add(
        self,
        component: str,
        op: str,
        inputs: Mapping[str, str],
        params: Mapping[str, Any],
        *,
        spec: ComponentSpec | None = None,
        shapes: Shapes | None = None,
        precision: Any = "fp32",
        memory: int = 0,
        disk: int = 0,
        variant: str = "",
        cannot: str = "",
    ) -> str:
        """Add a step; returns its name. `variant` is no part of its key, nor is why it `cannot` be made here.

        Nor is which width a component is: its passes make the difference, so that the same passes on the denoiser
        itself, or at the beginning of another width's, are the same step.
        """
        of = self.family.plain(component)
        stage, gives, revision, packages, host, lacking = _about(op, self.machine)
        cannot = cannot or lacking
        device: Mapping[str, str] = {}
        if op in BACKENDS and not cannot:
            backend, found = BACKENDS[op], self.machine.probes[op]
            options = backend.options.model_validate(params["options"])
            cannot, device = backend.lacks(found, precision, options), backend.device(found, options)
        letters = {d for t in (*spec.inputs, *spec.outputs) for d in t.dims} if spec and shapes else set()
        bound = {letter: bounds for letter, bounds in (shapes or {}).items() if not spec or letter in letters}
        parts = {
            "op": op,
            "revision": revision,
            "component": of,
            "params": params,
            "precision": precision,
            "spec": spec.as_json() if spec else None,
            "shapes": {letter: list(bounds) for letter, bounds in bound.items()},
            "inputs": {role: name if name == SOURCE else self.steps[name].key for role, name in inputs.items()},
            "versions": {name: self.machine.versions.get(name) for name in packages},
            "machine": self._identity(op) if host else dict(device) or None,
        }
        key = key_of(parts)
        if (known := next((name for name, step in self.steps.items() if step.key == key), None)) is not None:
            return known
        job = Job(of, params, precision, spec, bound)
        step = Step(component, stage, op, gives, dict(inputs), job, parts, key, cannot, memory, disk, variant)
        if step.name in self.steps or not (stage in _SHARED_STAGES or gives in _SHARED_KINDS):
            step = replace(step, target=self.target)
        self.steps[step.name] = step
        return step.name

    def _identity(self, op: str) -> dict[str, str]:
        probe = self.machine.probes.get(op)
        return {**self.machine.identity, **(probe.identity if probe else {})}


def _about(op: str, machine: Machine) -> tuple[Stage, Kind, int, tuple[str, ...], bool, str]:
    """Stage, kind given, revision, packages, machine-bound and obstacle of an op, pass or backend."""
    if op in BACKENDS:
        backend = BACKENDS[op]
        probe = machine.probes[op]
        cannot = "" if probe.available else f"{probe.reason} ({probe.hint})"
        return "compile", "engine", backend.revision, backend.packages, backend.host_bound, cannot
    if op in PASSES:
        record = PASSES[op]
        return record.stage, record.kind, record.revision, record.packages, False, _missing(record.packages, machine)
    row = OPS[op]
    return row.stage, row.gives, row.revision, row.packages, row.host, _missing(row.packages, machine)


def _missing(packages: Iterable[str], machine: Machine) -> str:
    missing = [name for name in packages if machine.versions.get(name) is None]
    return f"{', '.join(missing)} not installed (pip install 'sdcompile[compile]')" if missing else ""
