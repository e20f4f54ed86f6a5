"""recipe + source + machine -> Plan.

The one place where a combination of family, backend, precision, pass and shape is accepted or
refused. Pure: reads no weights, writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sdcompile import metrics
from sdcompile.backends import BACKENDS, Backend
from sdcompile.errors import RecipeError
from sdcompile.families import FAMILIES, Family
from sdcompile.passes import PASSES
from sdcompile.plan.draft import Draft
from sdcompile.plan.steps import SOURCE, Machine, Plan
from sdcompile.recipe import Recipe, dump
from sdcompile.samplers import SAMPLERS
from sdcompile.spec import PIPELINE, ComponentSpec, Shapes

if TYPE_CHECKING:
    from sdcompile.steps.layout import Source

GIB = 1 << 30

# Peak resident memory of a step: (times the component's fp32 bytes, plus GiB). Measured on SD 1.5 at
# 512x512, whose UNet is 3.2 GiB: export 3.80, openvino compile 3.39 and verify 3.69, record 4.19.
_EXPORT, _CAST, _COMPILE, _RECORD = (1.0, 0.75), (0.2, 0.5), (1.2, 0.6), (1.1, 0.9)


def _memory(figures: tuple[float, float], size: int) -> int:
    return int(figures[0] * size + figures[1] * GIB)


def resolve(
    recipe: Recipe, source: Source, machine: Machine, fallbacks: Mapping[str, str] = MappingProxyType({})
) -> Plan:
    """Lay out every step of `recipe` for `source` on `machine`.

    `fallbacks` tells, per component, why it is not built as first asked; the manifest repeats it.

    Raises RecipeError with all faults at once when the combination is not possible anywhere;
    what is merely impossible on this machine is marked on the step (`cannot`).
    """
    family = FAMILIES[recipe.family]
    specs = family.components(source.configs)
    facts = family.facts(source.configs)
    faults: list[str] = []
    notes = list(source.notes)
    shapes = _collect(faults, lambda: family.shapes(recipe.shape_request, source.configs)) or {}
    names = recipe.wanted(family.required)
    chosen = {name: _choose(recipe, family, name, faults) for name in names}
    faults += _faults_of_defaults(recipe, shapes)
    if faults:
        lines = [_located(recipe, line) for fault in faults for line in fault.splitlines()]
        raise RecipeError("\n".join(lines), "correct the recipe; its fields: sdcompile schema")

    draft = Draft(family, source, machine)
    folders = tuple(dict.fromkeys(family.folders[name] for name in names))
    checkpoints = {
        folder: draft.add(
            folder,
            "checkpoint",
            {SOURCE: SOURCE},
            _converted(_files(source, folder), machine),
            disk=_widened(source, folder),
        )
        for folder in folders
    }
    assets = draft.add(PIPELINE, "assets", {SOURCE: SOURCE}, _files(source, "tokenizer", "scheduler"), disk=4 << 20)
    tokenizer = draft.add(PIPELINE, "tokenizer", {SOURCE: assets}, {}, disk=4 << 20)
    first, last = recipe.sampler_steps
    tables = draft.add(
        PIPELINE, "samplers", {SOURCE: assets},
        {"samplers": _samplers(recipe), "num_inference_steps": list(range(first, last + 1))},
        disk=4 << 20,
    )  # fmt: skip

    forms: dict[str, str] = {}
    engines: dict[str, str] = {}
    for name in names:
        backend, precision, params = chosen[name]
        folder = family.folders[name]
        forms[name], engines[name] = _component(
            draft, name, backend, precision, params, specs[name], shapes, facts,
            checkpoints[folder], recipe.opset, source.fp32_bytes(folder),
        )  # fmt: skip
        notes += [f"{backend.name}: {note}" for note in machine.probes[backend.name].notes]

    reports = _verification(draft, recipe, names, chosen, specs, shapes, forms, engines, checkpoints, tokenizer, tables)
    _package(
        draft, recipe, names, chosen, facts, shapes, engines, reports, tokenizer, tables, dict(fallbacks)
    )  # fmt: skip
    return Plan(recipe, tuple(draft.steps.values()), tuple(dict.fromkeys(notes)))


def _choose(recipe: Recipe, family: Family, name: str, faults: list[str]) -> tuple[Backend, Any, dict[str, Any]]:
    """The backend, precision and params of one component; adds to `faults` what cannot be."""
    chosen = recipe.effective(name)
    backend = BACKENDS[chosen.backend]
    if chosen.precision not in backend.realises:
        own = recipe.components.get(name)
        where = f"components.{name}.precision" if own and own.precision else "precision"
        faults.append(
            f"{where}: {backend.name} cannot make {chosen.precision} of {name}: it makes {', '.join(backend.realises)}"
        )
    options = backend.options(**chosen.build).model_dump(mode="json")
    return backend, chosen.precision, {"family": family.name, "options": options, **chosen.params}


def _component(
    draft: Draft,
    name: str,
    backend: Backend,
    precision: Any,
    params: dict[str, Any],
    spec: ComponentSpec,
    shapes: Shapes,
    facts: Mapping[str, Any],
    checkpoint: str,
    opset: int,
    size: int,
) -> tuple[str, str]:
    """The road of one component from checkpoint to engine; returns the names of its last form and engine."""
    module_params = {k: v for k, v in params.items() if k != "options"}
    form = checkpoint
    passes = [PASSES[p] for p in backend.realises[precision]]
    for record in passes:
        if record.kind == "checkpoint":
            form = draft.add(name, record.name, {"checkpoint": form}, {"family": params["family"]}, disk=size)
    if backend.takes == "onnx":
        export = {
            **module_params, "opset": opset, "attention": backend.export.get("attention", "sdpa"),
            "multiples": facts["multiples"],
        }  # fmt: skip
        # fp32 weights stay mapped while they are traced and written: one copy, and the tracer's own needs.
        form = draft.add(
            name, "onnx", {"checkpoint": form}, export, spec=spec, shapes=shapes,
            memory=_memory(_EXPORT, size), disk=size,
        )  # fmt: skip
        for record in passes:
            if record.kind == "onnx":
                form = draft.add(
                    name, record.name, {"onnx": form}, {}, spec=spec, shapes=shapes, precision=precision,
                    memory=_memory(_CAST, size), disk=size,
                )  # fmt: skip
    engine = draft.add(
        name, backend.name, {backend.takes: form}, params, spec=spec, shapes=shapes, precision=precision,
        memory=_memory(_COMPILE, size), disk=size,
    )  # fmt: skip
    return form, engine


def _verification(
    draft: Draft,
    recipe: Recipe,
    names: tuple[str, ...],
    chosen: Mapping[str, Any],
    specs: Mapping[str, ComponentSpec],
    shapes: Shapes,
    forms: Mapping[str, str],
    engines: Mapping[str, str],
    checkpoints: Mapping[str, str],
    tokenizer: str,
    tables: str,
) -> dict[str, str]:
    """Reference recordings, one report per engine, one for whole images; returns component -> report step."""
    if not all(chosen[name][0].verifiable for name in names):
        return {}
    verify, family = recipe.verify, draft.family
    module_params = {
        name: {k: v for k, v in chosen[name][2].items() if k not in ("options", "family")} for name in names
    }
    recording = {
        "family": family.name,
        "facts": family.facts(draft.source.configs),
        "components": module_params,
        "prompts": verify.prompts or _prompts(draft.source),
        "seed": verify.seed,
        "num_inference_steps": verify.num_inference_steps,
        "guidance_scale": recipe.defaults.guidance_scale,
        "sampler": recipe.default_sampler,
        "size": _default_size(recipe, shapes),
    }
    # One module or engine at a time is open, and its activations.
    sizes = [draft.source.fp32_bytes(family.folders[name]) for name in names]
    largest = _memory(_RECORD, max(sizes))
    record = draft.add(
        PIPELINE, "record", {**checkpoints, "tokenizer": tokenizer, "tables": tables}, recording, shapes=shapes,
        memory=largest, disk=64 << 20,
    )  # fmt: skip
    reports = {}
    for name in names:
        backend, precision, params = chosen[name]
        own = verify.floors.get(name)
        base = metrics.FLOORS[precision]
        floor = {
            "min_snr_db": base.min_snr_db if own is None or own.min_snr_db is None else own.min_snr_db,
            "min_cosine": base.min_cosine if own is None or own.min_cosine is None else own.min_cosine,
        }
        reports[name] = draft.add(
            name, "engine",
            {
                "engine": engines[name], "samples": record, "checkpoint": checkpoints[family.folders[name]],
                **({"onnx": forms[name]} if backend.takes == "onnx" else {}),
            },
            {**params, "backend": backend.name, "floor": floor},
            spec=specs[name], shapes=shapes, precision=precision, memory=draft.steps[engines[name]].memory_bytes,
        )  # fmt: skip
    lowest = min((chosen[name][1] for name in names), key=lambda p: metrics.FLOORS[p].min_snr_db)
    floor_psnr = verify.min_image_psnr_db
    reports[PIPELINE] = draft.add(
        PIPELINE, "images", {**engines, "samples": record, "tokenizer": tokenizer, "tables": tables},
        {
            **recording, "backends": {name: chosen[name][0].name for name in names},
            "min_psnr_db": metrics.IMAGE_FLOORS_DB[lowest] if floor_psnr is None else floor_psnr,
        },
        shapes=shapes, memory=largest,
    )  # fmt: skip
    return reports


def _package(
    draft: Draft,
    recipe: Recipe,
    names: tuple[str, ...],
    chosen: Mapping[str, Any],
    facts: Mapping[str, Any],
    shapes: Shapes,
    engines: Mapping[str, str],
    reports: Mapping[str, str],
    tokenizer: str,
    tables: str,
    fallbacks: dict[str, str],
) -> None:
    source = draft.source
    params = {
        # What the source is, not where it lies: a path would tie the bundle to a machine.
        "recipe": {**dump(recipe), "source": source.id},
        "source": {
            "id": source.id, "kind": source.kind, "revision": source.revision, "licence": source.licence,
            "files": {path: f.sha256 for path, f in source.files.items()},
        },
        "facts": facts,
        "fallbacks": fallbacks,
        "components": {
            name: {"backend": chosen[name][0].name, "precision": chosen[name][1], "params": chosen[name][2],
                   "spec": draft.steps[engines[name]].parts["spec"]}
            for name in names
        },
        "defaults": {
            "sampler": recipe.default_sampler,
            "num_inference_steps": recipe.defaults.num_inference_steps,
            "guidance_scale": recipe.defaults.guidance_scale,
            "negative_prompt": recipe.defaults.negative_prompt,
            **_default_size(recipe, shapes),
        },
    }  # fmt: skip
    inputs = {f"engine.{name}": engines[name] for name in names}
    inputs |= {f"report.{name}": step for name, step in reports.items()}
    inputs |= {"tokenizer": tokenizer, "tables": tables}
    draft.add(
        PIPELINE, "bundle", inputs, params, shapes=shapes,
        disk=4 << 20,
    )  # fmt: skip


def _samplers(recipe: Recipe) -> list[dict[str, Any]]:
    """Every sampler as diffusers knows it; what the recipe sets wins over what the short name fixes."""
    rows = []
    for sampler in recipe.samplers:
        row = SAMPLERS.get(sampler.name)
        fixed = row.config if row and sampler.scheduler in (None, row.scheduler) else {}
        scheduler = sampler.scheduler or (row.scheduler if row else sampler.name)
        rows.append({"name": sampler.name, "scheduler": scheduler, "config": {**fixed, **sampler.config}})
    return rows


def _default_size(recipe: Recipe, shapes: Shapes) -> dict[str, int]:
    return {"height": recipe.defaults.height or shapes["H"].opt, "width": recipe.defaults.width or shapes["W"].opt}


def _faults_of_defaults(recipe: Recipe, shapes: Shapes) -> list[str]:
    faults = []
    if shapes:
        for side, letter in (("height", "H"), ("width", "W")):
            value, bounds = getattr(recipe.defaults, side), shapes[letter]
            if value is not None and not bounds.min <= value <= bounds.max:
                faults.append(f"defaults.{side}: {value} is outside the built {bounds.min} to {bounds.max}")
    return faults


def _located(recipe: Recipe, fault: str) -> str:
    """`field: fault` -> `file:line: field: fault`."""
    where = recipe.where(fault.partition(":")[0])
    return f"{where}: {fault}" if where else fault


def _files(source: Source, *folders: str) -> dict[str, Any]:
    return {
        "kind": source.kind,
        "folder": folders[0] if len(folders) == 1 else list(folders),
        "files": {path: f.sha256 for folder in folders for path, f in source.folder_files(folder).items()},
    }


def _converted(files: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """A single-file checkpoint is taken apart by diffusers' own tables, so its version decides the bytes."""
    return {**files, "diffusers": machine.versions.get("diffusers")} if files["kind"] == "file" else files


def _widened(source: Source, folder: str) -> int:
    """Bytes the checkpoint takes on disk: fp32 files are linked, others are rewritten."""
    stored = sum(f.bytes for f in source.folder_files(folder).values())
    wide = source.fp32_bytes(folder)
    return wide if wide > 1.5 * stored else 1 << 20


def _prompts(source: Source) -> list[str]:
    if source.id == "builtin:tiny":
        from sdcompile.models import tiny

        return list(tiny.prompts(3, seed=0))
    return [
        "a photograph of an old lighthouse on a cliff at sunset, waves breaking below",
        "a watercolour portrait of a woman in a green coat, soft light, plain background",
        "isometric drawing of a small city with trams, trees and red roofs, high detail",
    ]


def _collect(faults: list[str], make: Any) -> Any:
    """The value of `make()`, or None with its RecipeError added to `faults`."""
    try:
        return make()
    except RecipeError as error:
        faults.append(error.message)
        return None
