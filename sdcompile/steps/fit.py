"""Fit the samplers a recipe asks to be fitted, on the fp32 reference, and put them beside the compiled ones.

A few steps of a fitted table come closer to what many steps would give. Held-out prompts decide
whether the fit is kept: a sampler that does not come closer than its base stays the base.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile.backends import BACKENDS, Engine, Host
from sdcompile.errors import RecipeError
from sdcompile.families import FAMILIES
from sdcompile.files import link
from sdcompile.runtime import tables
from sdcompile.runtime.noise import randn
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.runtime.sampler import sample
from sdcompile.spec import Job
from sdcompile.steps import fitting, sampler
from sdcompile.steps.reference import build_references, model_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

# Noise of the prompts that judge is seeded far from that of the others.
_JUDGING = 1 << 20


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Write every table of `inputs["tables"]` and the fitted ones, and samplers.json with what each fit reached.

    inputs: one checkpoint folder per source folder, assets (the scheduler's config), tokenizer,
    tables. job.params: those of `record`, and fits: [{name, scheduler, config, num_inference_steps,
    guidance_scale, teacher_steps, iterations, seed, prompts, held_out}], the last two lists of texts.

    Raises RecipeError for a base that draws noise. The same inputs give the same bytes on one machine.
    """
    index = json.loads((inputs["tables"] / "samplers.json").read_text(encoding="utf-8"))
    for path in sorted(inputs["tables"].iterdir()):
        if path.name not in ("samplers.json", "artifact.json"):
            link(path, out / path.name)
    with tempfile.TemporaryDirectory(dir=out, prefix="reference-") as scratch:
        made = build_references(FAMILIES[job.params["family"]], inputs, job, Path(scratch))

        def open_engine(component: str) -> Engine:
            return BACKENDS["reference"].open(made[component], Host())

        model = model_of(job.params, inputs, job)
        with Pipeline(model, open_engine) as pipeline:
            for row in job.params["fits"]:
                table, report = fitted(pipeline, row, inputs["assets"], job)
                tables.save(out, row["name"], [table])
                index[row["name"]] = {
                    "scheduler": row["scheduler"],
                    "config": row["config"],
                    "num_inference_steps": [table.num_inference_steps],
                    "fit": report,
                }
    (out / "samplers.json").write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fitted(pipeline: Pipeline, row: Mapping[str, Any], assets: Path, job: Job) -> tuple[tables.Table, dict[str, Any]]:
    """The table of one fit, or its base where that is as near to the teacher on held-out prompts; and the report."""
    name = row["name"]

    def compiled(steps: int) -> tables.Table:
        source = sampler.source_config(assets, row["scheduler"])
        return sampler.table(row["scheduler"], source, steps, row["config"])

    base, many = compiled(row["num_inference_steps"]), compiled(row["teacher_steps"])
    if base.is_stochastic:
        raise RecipeError(
            f"sampler {name}: its base draws noise at every step, so there is no trajectory to fit to",
            "choose a deterministic base, such as dpmpp_2m or ddim",
        )

    def say(text: str, fraction: float | None = None) -> None:
        job.say(f"{name}: {text}", fraction)

    say(f"{row['teacher_steps']} steps of {len(row['prompts'])} prompts")
    noise = noise_of(pipeline, len(row["prompts"]), row["seed"])
    model = model_for(pipeline, row["prompts"], row["guidance_scale"])
    teacher = fitting.record(many, model, noise)
    student = fitting.fit(teacher, base, model, noise, iterations=row["iterations"], say=say)
    table = replace(fitting.table_of(student, name, teacher), num_inference_steps=row["num_inference_steps"])

    say(f"{row['teacher_steps']} steps of {len(row['held_out'])} held-out prompts")
    apart = noise_of(pipeline, len(row["held_out"]), row["seed"] + _JUDGING)
    judging = model_for(pipeline, row["held_out"], row["guidance_scale"])
    wanted = ran(many, judging, apart)
    reached = {
        "prompts": {"base": ran(base, model, noise), "fitted": ran(table, model, noise)},
        "held_out": {"base": ran(base, judging, apart), "fitted": ran(table, judging, apart)},
    }
    snr = {
        group: {
            kind: round(fitting.snr_db(final, teacher.final if group == "prompts" else wanted), 3)
            for kind, final in kinds.items()
        }
        for group, kinds in reached.items()
    }
    kept = "fitted" if snr["held_out"]["fitted"] > snr["held_out"]["base"] else "base"
    report = {
        "kept": kept,
        "snr_db": snr,
        "guidance_scale": row["guidance_scale"],
        "teacher_steps": row["teacher_steps"],
        "prompts": len(row["prompts"]),
        "held_out": len(row["held_out"]),
        "timesteps": [
            round(t, 3) for t in (student.timesteps if kept == "fitted" else [c.timestep for c in base.calls])
        ],
    }
    return (table if kept == "fitted" else replace(base, sampler=name)), report


def noise_of(pipeline: Pipeline, images: int, seed: int) -> Floats:
    """Unit noise (images, C, h, w) of the default size, a seed for each image."""
    facts, defaults = pipeline.model.facts, pipeline.model.defaults
    sides = (side // facts["vae_scale_factor"] for side in (defaults.height, defaults.width))
    shape = (1, facts["latent_channels"], *sides)
    return np.concatenate([randn(shape, seed + number) for number in range(images)])


def model_for(pipeline: Pipeline, prompts: Sequence[str], guidance_scale: float) -> fitting.Model:
    """The guided denoiser for `prompts`, one image each."""
    denoiser = pipeline.denoiser(prompts, [""] * len(prompts), (guidance_scale,))
    everyone = np.arange(len(prompts))

    def model(latents: Floats, timestep: float) -> Floats:
        return replace(denoiser, timesteps=(timestep,))(latents, 0, everyone)

    return model


def ran(table: tables.Table, model: Callable[[Floats, float], Floats], noise: Floats) -> Floats:
    """The final latents of `table`."""
    return sample(table, lambda latents, index, images: model(latents, table.calls[index].timestep), noise)
