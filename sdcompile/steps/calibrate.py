"""What passes are fitted to and judged by: the reference's feeds and answers on many trajectories.

Never those that `record` verifies with: other prompts and other seeds, which the plan holds it to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdcompile.runtime.model import Model
from sdcompile.samples import Writer
from sdcompile.spec import Job
from sdcompile.steps.reference import GUIDED, Call, Trajectory, model_of, nearest, play, with_step_cache

_HELD_OUT = (4, 3)
_UNGUIDED = (5, 2)
_SHAPES = 7, {0: "min", 1: "max"}
"""Of every so many trajectories, which. No two of the cycles share a factor: the part that is held out meets every
shape and both kinds of guidance, as the fitted part does, from 16 trajectories on."""

# Multiples of the golden ratio's fraction fill [0, 1) evenly, however many are taken.
_GOLDEN = 0.6180339887498949


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Write the samples form (see `sdcompile.samples`) of the components in job.params["record"] into `out`.

    With job.params["step_cache"] every trajectory is run a second time with cached steps, for the denoiser's shallow
    stand-in alone, of which as many calls are kept.

    inputs and job.params as for `record`, and: images (trajectories to run), max_samples (calls to keep
    of each component). One trajectory in four is held out, one in five is unguided, one in seven has the min
    and one the max shape. Kept calls are spread evenly over trajectories and timesteps. The same inputs give
    the same bytes on one machine.
    """
    params = job.params
    model = model_of(params, inputs, job)
    planned = list(trajectories(params, job.shapes, model))
    keeping = _Keeping(Writer(out), frozenset(params["record"]), params["max_samples"], len(planned), params["seed"])
    if "step_cache" in params:
        planned += [with_step_cache(t, params["step_cache"]) for t in planned]
    for _trajectory, _arrays in play(inputs, job, model, planned, keeping, out):
        pass
    keeping.writer.index([asdict(t) for t in planned])


def trajectories(params: Mapping[str, Any], shapes: Mapping[str, Any], model: Model) -> Iterator[Trajectory]:
    """`images` pipeline calls, each with the next prompts and the next seed."""
    prompts, scale = params["prompts"], float(params["guidance_scale"])
    steps = nearest(model.samplers[params["sampler"]].num_inference_steps, params["num_inference_steps"])
    takes_scale_as_input = bool(params["facts"].get("time_cond_proj_dim"))
    guided = scale if scale > 1 or takes_scale_as_input else GUIDED
    usual = scale if scale > 1 else 1.0
    taken = 0
    for number in range(min(params["images"], params["max_samples"])):
        every, named = _SHAPES
        shape = named.get(number % every, "opt")
        batch, height, width = (getattr(shapes[letter], shape) for letter in "BHW")
        # An unguided recipe is mostly fed unguided rows, and still must bear guided ones.
        guidance = (1.0 if usual > 1 else guided) if _is_turn(number, _UNGUIDED) else usual
        yield Trajectory(
            id=f"{number:03d}",
            prompts=tuple(prompts[(taken + k) % len(prompts)] for k in range(batch)),
            negative_prompt="",
            seed=params["seed"] + number,
            num_inference_steps=steps,
            guidance_scale=guidance,
            sampler=params["sampler"],
            height=height,
            width=width,
            shape=shape,
        )
        taken += batch


def held_out(trajectory: int) -> bool:
    """Every fourth trajectory, from the fourth on."""
    return _is_turn(trajectory, _HELD_OUT)


def _is_turn(trajectory: int, cycle: tuple[int, int]) -> bool:
    every, turn = cycle
    return trajectory % every == turn


def kept_steps(steps: int, trajectory: int, trajectories: int, max_samples: int, seed: int) -> frozenset[int]:
    """Steps to keep of one trajectory so that at most `max_samples` are kept of all, evenly over time.

    Each trajectory's share is cut into equal stretches of time and shifted by its own fraction of one.
    """
    share = ((trajectory + 1) * max_samples) // trajectories - (trajectory * max_samples) // trajectories
    if share >= steps:
        return frozenset(range(steps))
    shift = ((trajectory + 1) * _GOLDEN + np.random.default_rng(seed).random()) % 1
    return frozenset(int((k + shift) * steps / share) for k in range(share))


@dataclass
class _Keeping:
    writer: Writer
    components: frozenset[str]
    max_samples: int
    trajectories: int
    seed: int

    def __call__(self, call: Call) -> None:
        if call.component not in self.components:
            return
        step, steps = (0, 1) if call.step is None else (call.step, call.steps)
        if call.trajectory.step_cache != "off":
            shallow = call.trajectory.shallow_steps(call.steps)
            if step not in shallow:
                return
            step, steps = shallow.index(step), len(shallow)
        number = call.trajectory.number
        if step in kept_steps(steps, number, self.trajectories, self.max_samples, self.seed):
            told = {**call.told, "held_out": held_out(number)}
            self.writer.add(call.component, told, call.feeds, call.outputs)
