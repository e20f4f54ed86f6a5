"""What verification compares engines with: the reference's feeds and answers in every region and shape.

It runs few trajectories and keeps their images too. `calibrate` records for passes, from other ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdcompile.runtime.model import Model
from sdcompile.samples import Writer, write_images
from sdcompile.spec import Job
from sdcompile.steps.reference import (
    GUIDED,
    REGIONS,
    Call,
    Trajectory,
    decoded_by_source,
    model_of,
    nearest,
    play,
    with_step_cache,
)  # fmt: skip

# Enough for every region to hold several steps; a full-size fp32 step takes seconds, so not more.
STEPS = 10
# For the trajectories that are run for their shape: one step for each region.
FEW_STEPS = 3
BUDGET_BYTES = 256 << 20


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Write the samples form (see `sdcompile.samples`) into `out`.

    inputs: one checkpoint folder per source folder (text_encoder, unet, vae), tokenizer, tables.
    job.params: family, facts, components {name: {params}}, prompts, seed, num_inference_steps (None =
    chosen here), guidance_scale, sampler, size {height, width}, step_cache (absent, or `every`).
    job.shapes: every letter's range.

    The prompts are run at the opt shape; a short unguided trajectory covers the min shape (fewest
    denoiser rows) and a short guided one the max shape; with step_cache each is run a second time with
    cached steps. Of each trajectory one step per region is kept, another one for every trajectory. Where
    another decoder is built, the images of the source's own are kept as well. The same inputs give the
    same bytes on one machine.
    """
    model = model_of(job.params, inputs, job)
    planned = list(trajectories(job.params, job.shapes, model))
    if "step_cache" in job.params:
        planned += [with_step_cache(t, job.params["step_cache"]) for t in planned]
    keeping = _Keeping(Writer(out))
    images = {t.id: arrays for t, arrays in play(inputs, job, model, planned, keeping, out)}
    own = decoded_by_source(inputs, job, model, {name: arrays["final"] for name, arrays in images.items()}, out)
    write_images(out, {name: {**arrays, **own.get(name, {})} for name, arrays in images.items()})
    keeping.writer.index([asdict(t) for t in planned], keeping.left_out)


def trajectories(params: Mapping[str, Any], shapes: Mapping[str, Any], model: Model) -> Iterator[Trajectory]:
    """The pipeline calls that cover prompts, guidance and shapes, in a fixed order."""
    prompts, scale = tuple(params["prompts"]), float(params["guidance_scale"])
    available = model.samplers[params["sampler"]].num_inference_steps
    steps = nearest(available, params["num_inference_steps"] or STEPS)
    few = nearest(available, min(FEW_STEPS, steps))
    sizes = {which: tuple(getattr(shapes[letter], which) for letter in "BHW") for which in ("min", "opt", "max")}

    plans = [("opt", first, steps, scale) for first in range(0, len(prompts), sizes["opt"][0])]
    if sizes["min"] != sizes["opt"] or scale > 1:
        plans.append(("min", 0, few, 1.0))
    takes_scale_as_input = bool(params["facts"].get("time_cond_proj_dim"))
    if sizes["max"] != sizes["opt"] or (scale <= 1 and not takes_scale_as_input):
        plans.append(("max", 0, few, scale if scale > 1 or takes_scale_as_input else GUIDED))
    for number, (shape, first, count, guidance) in enumerate(plans):
        batch, height, width = sizes[shape]
        yield Trajectory(
            id=f"{number:02d}",
            prompts=tuple(prompts[(first + k) % len(prompts)] for k in range(batch)),
            negative_prompt="",
            seed=params["seed"] + number,
            num_inference_steps=count,
            guidance_scale=guidance,
            sampler=params["sampler"],
            height=height,
            width=width,
            shape=shape,
        )


def kept_steps(count: int, trajectory: int) -> dict[int, str]:
    """Step -> region of the steps to keep of `count`: one per region, further on for each trajectory.

    The first trajectory keeps the very first, a middle and the very last step.
    """
    edges = [round(count * k / 3) for k in range(4)]
    kept: dict[int, str] = {}
    for region, begin, end in zip(REGIONS, edges, edges[1:], strict=False):
        size = end - begin
        if size > 0:
            shift = {"early": trajectory, "mid": size // 2 + trajectory, "late": size - 1 - trajectory}[region]
            kept[begin + shift % size] = region
    return kept


@dataclass
class _Keeping:
    """Of the denoiser only some steps are kept, of the others every call, up to BUDGET_BYTES.

    Trajectories with cached steps are run for those alone, of which as many are kept.
    """

    writer: Writer
    left_out: int = 0

    def __call__(self, call: Call) -> None:
        if not self._wanted(call):
            return
        size = sum(array.nbytes for array in (*call.feeds.values(), *call.outputs.values()))
        have = self.writer.has(call.component, shape=call.trajectory.shape)
        if have and self.writer.bytes + size > BUDGET_BYTES:
            self.left_out += 1
            return
        self.writer.add(call.component, call.told, call.feeds, call.outputs)

    def _wanted(self, call: Call) -> bool:
        number = call.trajectory.number
        if call.trajectory.step_cache == "off":
            return call.step is None or call.step in kept_steps(call.steps, number)
        shallow = call.trajectory.shallow_steps(call.steps)
        return call.step in shallow and shallow.index(call.step) in kept_steps(len(shallow), number)
