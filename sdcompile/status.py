"""Answers about builds: what would be made and why, what changed, what this machine has.

Reads the plan, the store and package metadata; makes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile import machine
from sdcompile.backends import BACKENDS
from sdcompile.bundle import read as read_bundle
from sdcompile.errors import BundleError, RecipeError
from sdcompile.files import size_bytes
from sdcompile.passes import PASSES, quantization
from sdcompile.passes.base import read_effect
from sdcompile.run import Build, wanted
from sdcompile.spec import PIPELINE, Stage, at_target

if TYPE_CHECKING:
    from sdcompile.bundle import ComponentEntry
    from sdcompile.plan import Step
    from sdcompile.runtime.choosing import Fit


def check_component(work: Build, only: str | None) -> None:
    """Raise RecipeError when `only` names no component of the plan."""
    known = sorted({step.component for step in work.plan} - {PIPELINE})
    if only is not None and only not in known:
        raise RecipeError(f"--only {only}: no such component", f"this recipe has: {', '.join(known)}")


def check_stage(work: Build, stage: Stage) -> None:
    """Raise RecipeError when the recipe asks for nothing of a stage that not every recipe has."""
    if stage in _ASKED_BY and not any(step.stage == stage for step in work.plan):
        raise RecipeError(f"{work.recipe.name} has no {stage} stage", _ASKED_BY[stage])


def outcome(work: Build, paths: Mapping[str, Path], placed: Path | None) -> dict[str, Any]:
    """What a command has to show at its end: the bundle, its size, every report, and what passes did."""
    reports = {
        step.of: json.loads((paths[step.name] / "report.json").read_text(encoding="utf-8"))
        for step in work.plan
        if step.gives == "report" and step.name in paths
    }
    return {
        "name": work.recipe.name,
        "bundle": str(placed) if placed else None,
        "bytes": size_bytes(placed) if placed else None,
        "folders": {name: str(path) for name, path in paths.items()} if placed is None else {},
        "reports": reports,
        "effects": _effects(work, paths, placed),
        "fallbacks": dict(work.fallbacks),
    }


def _effects(work: Build, paths: Mapping[str, Path], bundle: Path | None) -> dict[str, Any]:
    """Component -> {"passes": what each pass did, "races": it against the rest}: of the bundle, or of steps made."""
    if bundle is not None:
        found = {
            at_target(name, target): {"passes": entry.effects, "races": entry.races}
            for target, one in read_bundle(bundle).by_target().items()
            for name, entry in one.components.items()
        }
        return {name: row for name, row in found.items() if row["passes"] or row["races"]}
    told: dict[str, Any] = {}
    for step in work.plan:
        if step.op in PASSES and not step.variant and step.name in paths:
            effect = read_effect(paths[step.name])
            if effect is not None:
                row = told.setdefault(step.of, {"passes": [], "races": []})
                row["passes"].append({"pass": step.op, **effect})
    for step in work.plan:
        if step.gives == "effects" and step.name in paths:
            measured = json.loads((paths[step.name] / "each_pass.json").read_text(encoding="utf-8"))
            for effect in told.get(step.of, {"passes": ()})["passes"]:
                effect |= measured.get(effect["pass"], {})
    return told


_ASKED_BY: dict[Stage, str] = {
    "prune": "name its passes: components: {unet: {prune: {PASS: {...}}}}",
    "calibrate": "only passes want samples, such as those of precision int8: components: {unet: {precision: int8}}",
    "quantize": "ask for a precision that a pass makes, as in components: {unet: {precision: int8}}",
}


def quantized(work: Build, only: str | None) -> dict[str, Step]:
    """Component (of one of several targets: unet@openvino) -> the pass with parameters that quantizes it."""
    found = (s for s in work.plan if s.op in PASSES and quantization((s.op,)) and not s.variant)
    return {step.of: step for step in found if only in (None, step.component)}


def rows(work: Build, only: str | None) -> list[dict[str, Any]]:
    """One row per step: hit, make, not needed or cannot; why; estimated memory and disk in bytes."""
    plan = work.plan.until("package", only)
    needed = wanted(plan, work.store)
    table = []
    for step in plan:
        if step.name not in needed:
            state, reason = "skip", "nothing missing depends on it"
        elif not needed[step.name]:
            state, reason = "hit", ""
        else:
            state, reason = ("cannot", step.cannot) if step.cannot else ("make", _reason(work, step))
        table.append(
            {
                "step": step.name, "component": step.component, "target": step.target, "stage": step.stage,
                "op": step.op, "state": state,
                "reason": reason, "memory_bytes": step.memory_bytes, "disk_bytes": step.disk_bytes, "key": step.key,
            }
        )  # fmt: skip
    return table


def _reason(work: Build, step: Step) -> str:
    damage = work.store.damage(step.key)
    if damage:
        return f"the stored one is damaged: {damage}"
    if work.store.last(work.recipe.name, step.name) is None:
        return "never made"
    changes = changed(work, step)
    if not changes:
        return "no longer in the store"
    return changes[0] + (f" (and {len(changes) - 1} more)" if len(changes) > 1 else "")


def changed(work: Build, step: Step) -> list[str]:
    """What differs between this step's key and the last one of its name, upstream steps by their names."""
    last = work.store.last(work.recipe.name, step.name)
    if last is None or work.store.last_key(work.recipe.name, step.name) == step.key:
        return []
    upstream = {work.plan[name].key: name for name in step.inputs.values() if name != "source"}
    return work.store.explain(last, step.parts, upstream)


def explanation(work: Build, name: str) -> dict[str, Any]:
    """The readable key of one step, whether it is in the store, and what changed since it was last made."""
    known = [step.name for step in work.plan]
    if name not in known:
        raise RecipeError(f"no step is called {name}", "this recipe has: " + ", ".join(known))
    step = work.plan[name]
    return {
        "step": name,
        "key": step.key,
        "state": "hit" if work.store.get(step.key) else "make",
        "made_before": work.store.last(work.recipe.name, name) is not None,
        "changes": changed(work, step),
        "parts": dict(step.parts),
    }


def doctor(store: Path) -> dict[str, Any]:
    """Backends, processor, memory and disk of this machine."""
    total, available = machine.memory_bytes()
    return {
        "cpu": machine.cpu_model(),
        "threads": machine.threads(),
        "features": list(machine.cpu_features()),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "store": str(store),
        "disk_free_bytes": machine.free_disk_bytes(store.absolute()),
        "backends": [
            {
                "name": name, "available": probe.available, "version": probe.version, "devices": list(probe.devices),
                "precisions": list(backend.realises), "reason": probe.reason, "hint": probe.hint,
                "notes": list(probe.notes),
            }
            for name, backend in BACKENDS.items()
            for probe in (backend.probe(),)
        ],
    }  # fmt: skip


def fitness(folder: Path, target: str | None = None) -> dict[str, Any]:
    """Can this machine run the bundle at `folder`? Per component which engine, or why not and what to type.

    Of several targets: each of them, or `target` alone; which would be run; and what to install or build besides.
    Reads the manifest and asks the backends; loads no engine. Raises BundleError when `folder` is no bundle,
    RecipeError when `target` is none of its targets.
    """
    from sdcompile import bundle
    from sdcompile.runtime import choosing

    whole = bundle.read(folder)
    if target is not None:
        choosing.named(folder, whole, target)
    ways = whole.by_target()
    verdicts = [choosing.judge(folder, one) for one in ways.values()]
    told = [
        {
            "target": verdict.target, "runs": verdict.fault is None,
            "components": [_fit(folder, ways[verdict.target].components[fit.component], fit) for fit in verdict.fits],
        }
        for verdict in verdicts
        if target in (None, verdict.target)
    ]  # fmt: skip
    runs = any(row["runs"] for row in told)
    if not whole.targets:
        return {"bundle": str(folder), "runs": runs, "components": told[0]["components"]}
    chosen = next((verdict.target for verdict in verdicts if verdict.fault is None), None)
    hints = choosing.remedies(whole, verdicts)
    return {"bundle": str(folder), "runs": runs, "target": chosen, "targets": told, "hints": hints}


def _fit(folder: Path, entry: ComponentEntry, fit: Fit) -> dict[str, Any]:
    reason, hint = (fit.fault.message, fit.fault.hint) if fit.fault is not None else ("", "")
    reason = reason.removeprefix(f"{folder}: ")
    return {
        "component": fit.component, "backend": entry.backend, "precision": entry.precision,
        "runs": fit.fault is None, "engine": fit.engine, "reason": reason, "hint": hint,
    }  # fmt: skip


def layer_tables(folder: Path, target: str | None = None) -> dict[str, dict[str, Any]]:
    """Component -> engine -> its compiler's layer table and what was claimed of it, of the bundle at `folder`.

    Of several targets: of each (unet@tensorrt_rtx:sm89), or of `target` alone.

    Raises BundleError when `folder` is no bundle or none of its engines carries such a table.
    """
    from sdcompile import bundle
    from sdcompile.backends.base import LAYERS
    from sdcompile.runtime import choosing

    whole = bundle.read(folder)
    ways = [choosing.named(folder, whole, target)] if target else whole.by_target().values()
    paths = {
        at_target(name, one.target): folder / one.folder_of(name) / LAYERS for one in ways for name in one.components
    }
    tables = {
        name: json.loads(path.read_text(encoding="utf-8"))["engines"] for name, path in paths.items() if path.is_file()
    }
    if not tables:
        raise BundleError(
            f"{folder} carries no layer table: its backends do not give one", "tensorrt_rtx and tensorrt do"
        )
    return tables
