"""Steps that run the fp32 reference: recordings to verify with, samples to calibrate with, and the reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdcompile import metrics
from sdcompile.backends import STAND_IN
from sdcompile.models import TINY, general_prompts
from sdcompile.plan import memory, stepcaching, widths
from sdcompile.plan.choice import Choice
from sdcompile.plan.draft import Draft, Road
from sdcompile.plan.steps import SOURCE
from sdcompile.recipe import Recipe
from sdcompile.spec import PIPELINE, ComponentSpec, Shapes
from sdcompile.steps.layout import CAPTION, PICTURES

if TYPE_CHECKING:
    from sdcompile.steps.layout import Source

VERIFY_PROMPTS = (
    "a photograph of an old lighthouse on a cliff at sunset, waves breaking below",
    "a watercolour portrait of a woman in a green coat, soft light, plain background",
    "isometric drawing of a small city with trams, trees and red roofs, high detail",
)
_BYTES = {"float32": 4, "int32": 4, "int64": 8}


def calibration(
    draft: Draft,
    recipe: Recipe,
    chosen: Mapping[str, Choice],
    wanted: Sequence[str],
    specs: Mapping[str, ComponentSpec],
    shapes: Shapes,
    inputs: Mapping[str, str],
    faults: list[str],
) -> str | None:
    """The step that records samples of the components `wanted` by passes; None when no pass wants any.

    Adds to `faults` what would let verification see what passes were fitted to.
    """
    if not wanted:
        return None
    own = recipe.calibrate
    prompts = recipe.calibration_prompts() or _calibration_prompts(draft.source)
    seen = sorted(set(prompts) & set(_verify_prompts(recipe, draft.source)))
    if seen:
        faults.append(
            f"calibrate.prompts: {seen[0]!r} is also one of verify.prompts; verification must not see what passes "
            "were fitted to"
        )
    if own.seed <= recipe.verify.seed < own.seed + own.images or (
        recipe.verify.seed <= own.seed < recipe.verify.seed + _VERIFY_SEEDS
    ):
        faults.append(
            f"calibrate.seed: {own.seed} to {own.seed + own.images - 1} overlap the seeds of verification, which "
            f"start at verify.seed {recipe.verify.seed}"
        )
    shallow = draft.family.shallow
    reference = _reference(draft, recipe, chosen, shapes, step_cache=shallow in wanted)
    if not draft.source.parts.keys() & set(wanted):
        inputs = draft.without_parts(inputs)
        reference["facts"] = draft.without_parts(reference["facts"])
    params = {
        **reference,
        "record": list(wanted),
        # A trajectory has as many prompts as its batch.
        "prompts": list(prompts[: own.images * shapes["B"].max]),
        **own.model_dump(include={"seed", "images", "num_inference_steps", "max_samples"}),
    }
    return draft.add(
        PIPELINE, "calibrate", inputs, params, shapes=shapes,
        memory=_reference_bytes(draft, chosen),
        disk=own.max_samples * sum(_call_bytes(specs[name], shapes) for name in wanted),
    )  # fmt: skip


def pictures(
    draft: Draft,
    chosen: Mapping[str, Mapping[str, Choice]],
    specs: Mapping[str, ComponentSpec],
    shapes: Shapes,
    inputs: Mapping[str, str],
) -> str | None:
    """The step that encodes the source's pictures for the passes, of any target, that want them; None without any."""
    if draft.source.pictures is None or not any(
        PICTURES in planned.wants for choices in chosen.values() for choice in choices.values()
        for planned in choice.passes
    ):  # fmt: skip
        return None
    files, family = draft.source.folder_files(PICTURES), draft.family
    there = draft.add(
        PICTURES, "assets", {SOURCE: SOURCE},
        {"kind": draft.source.kind_of(PICTURES), "folder": PICTURES, "files": {p: f.sha256 for p, f in files.items()}},
        disk=sum(file.bytes for file in files.values()),
    )  # fmt: skip
    text = next(iter(chosen.values()))["text_encoder"].module_params
    params = {name: value for name, value in text.items() if name != "family"}
    facts = family.facts(draft.source.configs)
    told = {
        "family": family.name,
        "components": {
            "text_encoder": {"params": params, "spec": specs["text_encoder"].as_json()},
            "vae_encoder": {"params": {}, "spec": specs["vae_encoder"].as_json()},
        },
        "size": {"height": shapes["H"].opt, "width": shapes["W"].opt},
        "scaling_factor": facts["scaling_factor"],
        "shift_factor": facts["shift_factor"],
    }
    captions = sum(path.endswith(CAPTION) for path in files)
    each = {name: _BYTES["float32"] * math.prod(specs[name].outputs[0].shape(shapes, "opt")[1:]) for name in
            ("text_encoder", "vae_encoder")}  # fmt: skip
    size = (len(files) - captions) * each["vae_encoder"] // 2 + (captions + 1) * each["text_encoder"]
    folders = {name: family.folder(name, ()) for name in told["components"]}
    return draft.add(
        PIPELINE, PICTURES,
        {**{folder: inputs[folder] for folder in folders.values()}, "tokenizer": inputs["tokenizer"], PICTURES: there},
        told,
        # As arrays, and as the bytes that are written.
        memory=memory.needed(memory.RECORD, max(map(draft.source.fp32_bytes, folders.values()))) + 2 * size, disk=size,
    )  # fmt: skip


def _call_bytes(spec: ComponentSpec, shapes: Shapes) -> int:
    """What the largest call of a component takes, feeds and answers, as it is recorded."""
    return sum(math.prod(t.shape(shapes, "max")) * _BYTES[t.dtype] for t in (*spec.inputs, *spec.outputs))


_VERIFY_SEEDS = 64
"""Seeds kept for verification: more trajectories than it runs."""


def verification(
    draft: Draft,
    recipe: Recipe,
    chosen: Mapping[str, Choice],
    specs: Mapping[str, ComponentSpec],
    shapes: Shapes,
    roads: Mapping[str, Road],
    inputs: Mapping[str, str],
) -> dict[str, str]:
    """Reference recordings, one report per engine, one for whole images; returns component -> report step.

    roads: how each component's engine was made. inputs: those of the recording.
    """
    if not all(choice.backend.verifiable for choice in chosen.values()):
        return {}
    verify = recipe.verify
    step_cache = recipe.settings(draft.family.denoiser).step_cache
    recording = {
        **_reference(draft, recipe, chosen, shapes, step_cache=step_cache is not None),
        "prompts": list(_verify_prompts(recipe, draft.source)),
        "seed": verify.seed,
        "num_inference_steps": verify.num_inference_steps,
    }
    # One module or engine at a time is open, and its activations.
    largest = _reference_bytes(draft, chosen)
    record = draft.add(PIPELINE, "record", inputs, recording, shapes=shapes, memory=largest, disk=64 << 20)
    reports = {
        name: draft.add(
            name, "engine",
            {"engine": road.engine, "samples": record, **road.forms, **_exported(draft, choice, road)},
            {
                **choice.params, "backend": choice.backend.name, "floor": _floor(recipe, name, choice),
                "own_floor": _own_floor(recipe, name, choice), **_how(draft, choice),
            },
            spec=specs[name], shapes=shapes, precision=choice.precision,
            memory=max(
                draft.steps[road.engine].memory_bytes,
                _stand_in_bytes(draft, name) if _cannot_run(draft, choice) else 0,
            ),
        )
        for name, choice in chosen.items()
        for road in (roads[name],)
    }  # fmt: skip
    full = widths.without(draft.family, chosen)
    reports[PIPELINE] = draft.add(
        PIPELINE, "images",
        {
            **{name: roads[name].engine for name in full},
            **{role: inputs[role] for role in ("tokenizer", "tables")}, "samples": record,
            **{f"onnx.{name}": roads[name].forms["onnx"] for name in full if _cannot_run(draft, full[name])},
        },
        {
            **recording, "backends": {name: choice.backend.name for name, choice in full.items()},
            "how": {name: _how(draft, choice) for name, choice in full.items()},
            "min_psnr_db": _image_floor_db(recipe, full), **_decoder_floor(recipe, draft.source),
            **({} if step_cache is None else {"step_cache_min_psnr_db": step_cache.min_psnr_db}),
            **({"scored": True} if draft.source.id == TINY else {}),
        },
        shapes=shapes,
        memory=max(largest, *(_stand_in_bytes(draft, name) for name in full if _cannot_run(draft, full[name])), 0),
    )  # fmt: skip
    return reports


_SCORED = 64
"""Prompts whose pictures say what a pass changes: the standard error of the change is then about 0.01."""


def told_apart(
    draft: Draft,
    recipe: Recipe,
    chosen: Mapping[str, Choice],
    shapes: Shapes,
    roads: Mapping[str, Road],
    shared: Mapping[str, str],
    notes: list[str],
) -> dict[str, str]:
    """Component -> the step that tells what each of its passes changed; adds to `notes` where none can.

    shared: tokenizer and tables, for pictures of the tiny model. A stand-in of cached steps is not told apart: its
    passes are the denoiser's.
    """
    family, found = draft.family, {}
    drawing = {name: chosen[name] for name in family.required}
    size = default_size(recipe, shapes)
    scored = (
        draft.source.id == TINY
        and recipe.settings(family.denoiser).step_cache is None
        and not any(_cannot_run(draft, choice) for choice in drawing.values())
        and size["height"] == size["width"] and not size["height"] % 64  # what its checker looks at
    )  # fmt: skip
    for name, road in roads.items():
        choice = chosen[name]
        pruned = any(p.record.stage == "prune" for p in choice.passes)
        if name == family.shallow or not (pruned or choice.rest):
            continue
        if why := _cannot_run(draft, choice):
            notes.append(f"{name}: what each pass changes in time is not measured: {why}")
            continue
        stations = road.stations()
        inputs = {f"station.{number}": engine for number, (_, engine) in enumerate(stations)}
        params: dict[str, Any] = {"backend": choice.backend.name, "passes": [op for op, _ in stations[1:]]}
        if scored and family.plain(name) == family.denoiser:
            inputs |= {**shared, **{other: roads[other].engine for other in drawing if other != family.denoiser}}
            of_model = _reference(draft, recipe, chosen, shapes, step_cache=False)
            params |= {
                **{key: value for key, value in of_model.items() if key != "components"},
                "num_inference_steps": recipe.defaults.num_inference_steps,
                "prompts": list(_tiny_prompts(_SCORED, "held_out")), "seed": recipe.verify.seed,
                "backends": {n: c.backend.name for n, c in drawing.items()} | {family.denoiser: choice.backend.name},
            }  # fmt: skip
        found[name] = draft.add(
            name, "each_pass", inputs, {**params, **_how(draft, choice)}, shapes=shapes, precision=choice.precision,
            memory=draft.steps[road.engine].memory_bytes,
        )  # fmt: skip
    return found


def _cannot_run(draft: Draft, choice: Choice) -> str:
    return draft.machine.probes[choice.backend.name].cannot_run


def _exported(draft: Draft, choice: Choice, road: Road) -> dict[str, str]:
    """The fp32 ONNX, by which the ranges of an engine that cannot run are judged."""
    return {"exported": road.plain} if _cannot_run(draft, choice) and road.plain else {}


def _how(draft: Draft, choice: Choice) -> dict[str, Any]:
    """What of this machine decides a report: the device that runs the engine, or why something stands in for it."""
    if why := _cannot_run(draft, choice):
        return {"stand_in": {"why": why, "version": draft.machine.probes[STAND_IN].version}}
    found = draft.machine.probes[choice.backend.name]
    options = choice.backend.options.model_validate(choice.params["options"])
    return {"device": {**found.identity, **choice.backend.device(found, options)}}


def default_size(recipe: Recipe, shapes: Shapes) -> dict[str, int]:
    return {"height": recipe.defaults.height or shapes["H"].opt, "width": recipe.defaults.width or shapes["W"].opt}


def _reference(
    draft: Draft, recipe: Recipe, chosen: Mapping[str, Choice], shapes: Shapes, *, step_cache: bool
) -> dict[str, Any]:
    """What every run of the reference is told of the model; with `step_cache`, also how to reuse deep features."""
    found = recipe.settings(draft.family.denoiser).step_cache
    components = {n: choice.module_params for n, choice in widths.without(draft.family, chosen).items()}
    if found is None or not step_cache:
        components = {n: stepcaching.plain(p) for n, p in components.items() if n != draft.family.shallow}
    return {
        **({"step_cache": found.every} if found is not None and step_cache else {}),
        "family": draft.family.name,
        "facts": draft.family.facts(draft.source.configs),
        "components": components,
        "guidance_scale": recipe.defaults.guidance_scale,
        "sampler": recipe.default_sampler,
        "size": default_size(recipe, shapes),
    }


def _reference_bytes(draft: Draft, chosen: Mapping[str, Choice]) -> int:
    return memory.needed(memory.RECORD, max(draft.source.fp32_bytes(draft.folder(name)) for name in chosen))


def _stand_in_bytes(draft: Draft, name: str) -> int:
    return memory.needed(memory.STAND_IN, draft.source.fp32_bytes(draft.folder(name)))


def _floor(recipe: Recipe, name: str, choice: Choice) -> dict[str, float]:
    own = recipe.verify.floors.get(name)
    base = metrics.PRUNED if choice.pruned else metrics.FLOORS[choice.precision]
    return {
        "min_snr_db": base.min_snr_db if own is None or own.min_snr_db is None else own.min_snr_db,
        "min_cosine": base.min_cosine if own is None or own.min_cosine is None else own.min_cosine,
    }


def _own_floor(recipe: Recipe, name: str, choice: Choice) -> dict[str, float] | None:
    """What an engine must reach against the pruned module it was made of; None when nothing was pruned.

    The floor of its precision; of int8, whose own cost a recipe may accept, no more than it asks for against
    the source.
    """
    if not choice.pruned:
        return None
    base, own = metrics.FLOORS[choice.precision], recipe.verify.floors.get(name)
    asked = None if own is None else own.min_snr_db
    return {
        "min_snr_db": base.min_snr_db if asked is None or choice.precision != "int8" else min(asked, base.min_snr_db),
        "min_cosine": base.min_cosine,
    }


def _image_floor_db(recipe: Recipe, chosen: Mapping[str, Choice]) -> float:
    if recipe.verify.min_image_psnr_db is not None:
        return recipe.verify.min_image_psnr_db
    if any(choice.pruned for choice in chosen.values()):
        return metrics.PRUNED_IMAGE_DB
    return min(metrics.IMAGE_FLOORS_DB[choice.precision] for choice in chosen.values())


def _decoder_floor(recipe: Recipe, source: Source) -> dict[str, float]:
    """What pictures of a decoder from another source must come to; {} where the model's own is built."""
    asked = recipe.verify.min_decoder_psnr_db
    return {"min_decoder_psnr_db": metrics.OTHER_DECODER_DB if asked is None else asked} if source.parts else {}


def _verify_prompts(recipe: Recipe, source: Source) -> tuple[str, ...]:
    if recipe.verify.prompts:
        return recipe.verify.prompts
    return _tiny_prompts(3, "held_out") if source.id == TINY else VERIFY_PROMPTS


def _calibration_prompts(source: Source) -> tuple[str, ...]:
    return _tiny_prompts(256, "train") if source.id == TINY else general_prompts()


def _tiny_prompts(count: int, split: str) -> tuple[str, ...]:
    from sdcompile.models import tiny

    # Not one prompt twice: each shows something new.
    return tuple(dict.fromkeys(tiny.prompts(count, seed=0, split=split)))
