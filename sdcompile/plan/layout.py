"""recipe + source + machine -> Plan.

The one place where a combination of family, backend, precision, pass and shape is accepted or
refused. Pure: reads no weights, writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sdcompile import edits
from sdcompile.errors import RecipeError
from sdcompile.families import FAMILIES, Family
from sdcompile.passes import quantization
from sdcompile.passes.base import Setting
from sdcompile.plan import memory, stepcaching, widths
from sdcompile.plan.choice import Choice, choose
from sdcompile.plan.draft import Draft, Road
from sdcompile.plan.packaging import Way, package
from sdcompile.plan.passing import faults_of_passes
from sdcompile.plan.sampling import fitting, samplers
from sdcompile.plan.steps import SOURCE, Machine, Plan
from sdcompile.plan.verification import calibration, pictures, told_apart, verification
from sdcompile.recipe import Recipe
from sdcompile.spec import PIPELINE, ComponentSpec, Precision, Shapes

if TYPE_CHECKING:
    from sdcompile.steps.layout import Source


def resolve(
    recipe: Recipe, source: Source, machine: Machine, fallbacks: Mapping[str, str] = MappingProxyType({})
) -> Plan:
    """Lay out every step of `recipe` for `source` on `machine`.

    `fallbacks` tells, per component, why it is not built as first asked; the manifest repeats it.

    Raises RecipeError with all faults at once when the combination is not possible anywhere;
    what is merely impossible on this machine is marked on the step (`cannot`).
    """
    family = FAMILIES[recipe.family]
    facts = family.facts(source.configs)
    faults: list[str] = []
    modules = family.components(source.configs)
    specs = stepcaching.specs_of(recipe, family, source.configs, modules, faults)
    specs = widths.specs_of(recipe, specs, faults)
    notes = list(source.notes)
    shapes = _collect(faults, lambda: family.shapes(recipe.shape_request, source.configs)) or {}
    names = recipe.wanted(family.required)
    settings = {name: _setting(family, source, name, shapes) for name in names if name in specs}
    chosen = _chosen(recipe, family, source, settings, faults)
    faults += _faults_of_defaults(recipe, shapes)
    for name in source.parts:
        faults += [f"components.{name}.source: {fault}" for fault in family.replaceable[name](source.configs)]
    _refuse(recipe, faults)

    draft = Draft(family, source, machine)
    # A replaced component's own folder as well: what it would have made is told beside what is made.
    folders = tuple(dict.fromkeys((*(family.folder(name, ()) for name in names), *source.parts)))
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
        {"samplers": samplers(recipe), "num_inference_steps": list(range(first, last + 1))},
        disk=4 << 20,
    )  # fmt: skip

    # What is made of the torch modules alone is the same for every target.
    some = next(iter(chosen.values()))
    tables = fitting(draft, recipe, some, shapes, {**checkpoints, "assets": assets, "tokenizer": tokenizer}, tables)
    shared = {"tokenizer": tokenizer, "tables": tables}
    reference = {**checkpoints, **shared}
    calibrating = [name for name in some if any(choices[name].calibrates for choices in chosen.values())]
    calibrated = list(dict.fromkeys(map(family.plain, calibrating)))
    samples = calibration(draft, recipe, some, calibrated, specs, shapes, reference, faults)
    given = {"assets": assets, **({"samples": samples} if samples else {})}
    if (encoded := pictures(draft, chosen, modules, shapes, reference)) is not None:
        given["pictures"] = encoded
    elif source.pictures is not None and not fallbacks:
        # With fallbacks, what would have learned on them may have lost its race.
        faults.append(
            "calibrate.pictures: nothing in this recipe learns on pictures; `prune: {..., recover: {...}}` of a "
            "component does, unless it says `renoise: 0`"
        )
    _refuse(recipe, faults)

    ways: dict[str, Way] = {}
    for target, one in recipe.by_target().items():
        draft.target, choices = target, chosen[target]
        roads: dict[str, Road] = {}
        for name, choice in choices.items():
            folder = draft.folder(name)
            made_of = checkpoints[folder] if name != family.shallow else roads[family.denoiser].forms["checkpoint"]
            roads[name] = _component(
                draft, name, choice, modules.get(family.plain(name)), specs[name], settings[name], facts,
                {**given, "teacher": made_of}, max(recipe.opset, choice.opset), source.fp32_bytes(folder),
            )  # fmt: skip
        ways[target] = Way(choices, roads, verification(draft, one, choices, specs, shapes, roads, reference))
        used = dict.fromkeys(choice.backend.name for choice in choices.values())
        notes += [f"{name}: {note}" for name in used for note in machine.probes[name].notes]
    # After all that is built anyway, which then has its own names.
    for target, one in recipe.by_target().items():
        if one.verify.each_pass:
            draft.target = target
            apart = told_apart(draft, one, ways[target].chosen, shapes, ways[target].roads, shared, notes)
            ways[target] = ways[target]._replace(apart=apart)
    # A target that fell back may have become another one; that is no fault of the recipe.
    _refuse(recipe, _twins(ways) if not fallbacks else [])
    draft.target = ""
    package(draft, recipe, ways, facts, shapes, shared, fallbacks)
    return Plan(recipe, tuple(draft.steps.values()), tuple(dict.fromkeys(notes)))


def _setting(family: Family, source: Source, name: str, shapes: Shapes) -> Setting:
    folder = family.folder(name, source.configs)
    modules, made = family.modules(family.plain(name), source.configs), source.edits.get(folder, ())
    left = None if modules is None else edits.renamed(modules, made)
    return Setting(
        source.configs[folder], left, shapes, family.facts(source.configs)["multiples"], edits=made,
        counts=source.counts.get(folder, {}),
    )  # fmt: skip


def _chosen(
    recipe: Recipe, family: Family, source: Source, settings: Mapping[str, Setting], faults: list[str]
) -> dict[str, dict[str, Choice]]:
    """Target ("" where there is one for all) -> component -> what it is built with; adds to `faults` what cannot be."""
    chosen: dict[str, dict[str, Choice]] = {}
    for target, one in recipe.by_target().items():
        found: list[str] = []
        chosen[target] = {name: choose(one, family, source.configs, name, found) for name in settings}
        for name, choice in chosen[target].items() if settings[family.denoiser].shapes else ():
            found += faults_of_passes(one, name, choice.passes, settings[name])
        found += [
            f"components.{name}: every target builds the same components; list it in the recipe's: components: "
            f"{{{name}: {{}}}}"
            for name in one.components
            if name not in settings and name not in recipe.components
        ]
        for line in found:
            field, _, text = line.partition(": ")
            at = recipe.field_of(target, field)
            own = "; or give it one of its own: {backend: ..., precision: ...}" if at == "precision" else ""
            told = (
                f"{at}: target {target}: {text}{own}" if target and not at.startswith("targets.") else f"{at}: {text}"
            )
            # What is wrong with the source is wrong for every target.
            faults += [told] if told not in faults and line not in faults else []
    return chosen


def _twins(ways: Mapping[str, Way]) -> list[str]:
    """Targets that are made of the very engines of an earlier one."""
    names = list(ways)
    engines = [[road.engine for road in way.roads.values()] for way in ways.values()]
    return [
        f"targets.{place}: {names[place]} builds the same engines as {names[engines.index(made)]}; leave one out"
        for place, made in enumerate(engines)
        if engines.index(made) < place
    ]


def _component(
    draft: Draft,
    name: str,
    choice: Choice,
    module: ComponentSpec | None,
    spec: ComponentSpec,
    setting: Setting,
    facts: Mapping[str, Any],
    named: Mapping[str, str],
    opset: int,
    size: int,
) -> Road:
    """The road of one component from checkpoint to engine, and past a rival where int8 or pruning must win.

    `module` is the spec of what the checkpoint means, `spec` that of the engine. `named` are the steps that passes
    want by role, the "teacher" among them, which is the checkpoint.
    """
    family, shapes, checkpoint = choice.params["family"], setting.shapes, named["teacher"]
    forms = {"checkpoint": checkpoint}

    def walk(
        forms: dict[str, str], kind: str, choice: Choice, variant: str = "", *, loose: bool = False
    ) -> tuple[str, ...]:
        passes = []
        for planned in (p for p in choice.passes if p.record.kind == kind):
            record, inputs = planned.record, {kind: forms[kind]}
            if planned.calibrates:
                inputs["samples"] = named["samples"]
            inputs |= {role: named[role] for role in planned.wants if role in named}
            params, of, precision = choice.module_params, spec, choice.precision
            if kind == "checkpoint":
                # fp32 and whole whatever the engine will be, so that all engines share the pruning.
                params, of, precision = stepcaching.plain(params), module or spec, "fp32"
            # A stand-in, a width, and what it was before a pass, have only some of the modules and nodes that patterns
            # may name.
            inherits = module is None or draft.family.plain(name) != name
            inherits |= loose and bool(planned.params.get("keep_fp32"))
            told = {"inherited": True} if inherits and kind != "checkpoint" else {}
            forms[kind] = draft.add(
                name, record.name, inputs, {"family": family, **params, **planned.params, **told}, spec=of,
                shapes=shapes, precision=precision,
                memory=memory.needed(planned.memory(setting), size), disk=int(planned.disk(setting) * size),
                variant=variant,
            )  # fmt: skip
            passes.append(forms[kind])
        return tuple(passes)

    def engine(forms: Mapping[str, str], choice: Choice, variant: str = "") -> str:
        backend = choice.backend
        return draft.add(
            name, backend.name, {backend.takes: forms[backend.takes]}, choice.params, spec=spec, shapes=shapes,
            precision=choice.precision, memory=memory.needed(backend.memory, size), disk=size, variant=variant,
        )  # fmt: skip

    def made(forms: dict[str, str], choice: Choice, variant: str = "", *, loose: bool = False) -> Road:
        """From a checkpoint to an engine; adds to `forms`."""
        if choice.backend.takes == "checkpoint":
            return Road(forms, (), engine(forms, choice, variant))
        export = {
            "family": family, **choice.module_params, "opset": opset,
            "attention": choice.export.get("attention", "sdpa"), "multiples": facts["multiples"],
        }  # fmt: skip
        # fp32 weights stay mapped while they are traced and written: one copy, and the tracer's own needs.
        forms["onnx"] = draft.add(
            name, "onnx", {"checkpoint": forms["checkpoint"]}, export, spec=spec, shapes=shapes,
            memory=memory.needed(memory.EXPORT, size), disk=size, variant=variant,
        )  # fmt: skip
        exported = forms["onnx"]
        passes = walk(forms, "onnx", choice, variant, loose=loose)
        return Road(forms, passes, engine(forms, choice, variant), exported)

    def race(mine: str, rival: str, told: Mapping[str, Any], *, graph: str | None, precision: Precision) -> str:
        backend = choice.backend
        inputs = {"engine": mine, "rival": rival, **({"onnx": graph} if graph else {})}
        return draft.add(
            name, "race", inputs, {"backend": backend.name, **told}, precision=precision,
            memory=2 * memory.needed(backend.memory, size), variant="" if graph else "unpruned",
            cannot=draft.machine.probes[backend.name].cannot_run,
        )  # fmt: skip

    passes = walk(forms, "checkpoint", choice)
    plain, rival = dict(forms), choice.unquantized
    # The same steps as `choice`'s own where nothing is quantized.
    variant = "" if choice.rest is None else rival.precision
    races: dict[str, str] = {}
    if choice.accept_pruned is not None and passes:
        # Before anything is quantized, and in the precision of what is not: whether int8 wins depends on the model.
        narrow, whole = made(plain, rival, variant), made({"checkpoint": checkpoint}, rival, "unpruned")
        told = {"speedup": choice.accept_pruned, "groups": False, "of": "prune"}
        races["prune"] = race(narrow.engine, whole.engine, told, graph=None, precision=rival.precision)
    road = made(forms, choice)
    if choice.accept is not None:
        other, told = made(plain, rival, variant), {**choice.accept, "of": "quantize"}
        races["quantize"] = race(road.engine, other.engine, told, graph=forms["onnx"], precision=choice.precision)

    def stations() -> list[tuple[str, str]]:
        # A pass of the prune stage is told before anything is quantized, as its race is.
        found = []
        for step in (checkpoint, *passes):
            op, last = draft.steps[step].op if step != checkpoint else "", step == forms["checkpoint"]
            variant = f"after-{op}" if op else "unpruned"
            found.append((op, made({"checkpoint": step}, rival, variant, loose=not last).engine))
        quantizer = next((p.record.name for p in choice.passes if quantization((p.record.name,))), None)
        return [*found, (quantizer, road.engine)] if quantizer else found

    return road._replace(passes=(*passes, *road.passes), races=races, stations=stations)


def _faults_of_defaults(recipe: Recipe, shapes: Shapes) -> list[str]:
    faults = []
    asked = {"defaults": {side: getattr(recipe.defaults, side) for side in ("height", "width")}}
    asked |= {f"profiles.{name}": options for name, options in (recipe.profiles or {}).items()}
    for place, options in asked.items() if shapes else ():
        tiled = options.get("tiling", recipe.defaults.tiling) == "auto" and place != "defaults"
        for side, letter in (("height", "H"), ("width", "W")):
            value, bounds = options.get(side), shapes[letter]
            if value is not None and (value < bounds.min or (value > bounds.max and not tiled)):
                faults.append(f"{place}.{side}: {value} is outside the built {bounds.min} to {bounds.max}")
    return faults


def _refuse(recipe: Recipe, faults: list[str]) -> None:
    if faults:
        lines = [_located(recipe, line) for fault in faults for line in fault.splitlines()]
        raise RecipeError("\n".join(lines), "correct the recipe; its fields: sdcompile schema")


def _located(recipe: Recipe, fault: str) -> str:
    """`field: fault` -> `file:line: field: fault`."""
    where = recipe.where(fault.partition(":")[0])
    return f"{where}: {fault}" if where else fault


def _files(source: Source, *folders: str) -> dict[str, Any]:
    return {
        "kind": source.kind_of(folders[0]),
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


def _collect(faults: list[str], make: Any) -> Any:
    """The value of `make()`, or None with its RecipeError added to `faults`."""
    try:
        return make()
    except RecipeError as error:
        faults.append(error.message)
        return None
