"""Record what the fp32 torch reference is fed, and answers, on real denoising trajectories.

The runtime's own pipeline runs with the reference's engines, each wrapped in a `Recorder`: what is
recorded is what the runtime feeds. Verification and calibration read it. It knows no backend but
the reference.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.backends import BACKENDS, Engine, Host
from sdcompile.families import FAMILIES, Family
from sdcompile.runtime.model import Model
from sdcompile.runtime.noise import randn
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.spec import ComponentSpec, Job
from sdcompile.steps import samples

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[np.generic]]

REGIONS = ("early", "mid", "late")

# Enough for every region to hold several steps; a full-size fp32 step takes seconds, so not more.
STEPS = 10
# For the trajectories that are run for their shape: one step for each region.
FEW_STEPS = 3
# A scale for the guided run of a model whose own default is unguided.
GUIDED = 4.0
BUDGET_BYTES = 256 << 20


@dataclass(frozen=True)
class Trajectory:
    """One call of the pipeline: its arguments (`call`), and under which name and shape label it is kept."""

    id: str
    prompts: tuple[str, ...]
    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    height: int
    width: int
    shape: str

    def call(self) -> dict[str, Any]:
        """The arguments to give a pipeline, but for output_type."""
        arguments = {k: v for k, v in asdict(self).items() if k not in ("id", "prompts", "shape")}
        return {"prompt": list(self.prompts), **arguments}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Trajectory:
        return cls(**{**row, "prompts": tuple(row["prompts"])})


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Write the samples form (see `steps.samples`) into `out`.

    inputs: one checkpoint folder per source folder (text_encoder, unet, vae), tokenizer, tables.
    job.params: family, facts, components {name: {params}}, prompts, seed, num_inference_steps (None =
    chosen here), guidance_scale, sampler, size {height, width}. job.shapes: every letter's range.

    The prompts are run at the opt shape; a short unguided trajectory covers the min shape (fewest
    denoiser rows) and a short guided one the max shape. Of each trajectory one step per region is
    kept, another one for every trajectory. The same inputs give the same bytes on one machine.
    """
    params, family = job.params, FAMILIES[job.params["family"]]
    model = model_of(params, inputs, job)
    recording = _Recording(family.denoiser)
    with tempfile.TemporaryDirectory(dir=out, prefix="reference-") as scratch:
        references = _references(family, inputs, job, Path(scratch))
        images: dict[str, Arrays] = {}
        planned = list(trajectories(params, job.shapes, model))
        for number, trajectory in enumerate(planned):
            # A pipeline of its own, because prompts it met before would not reach the text encoder again.
            with Pipeline(model, partial(_open, references, recording), low_memory=True) as pipeline:
                recording.begin(trajectory, pipeline, number)
                say = partial(_say_step, job, number, len(planned), len(recording.timesteps))
                images[trajectory.id] = _run(pipeline, trajectory, say)
        if "vae_encoder" in references:
            _encode(references, recording, planned, images, job)
    _write(out, recording, planned, images)


def model_of(params: Mapping[str, Any], inputs: Mapping[str, Path], job: Job) -> Model:
    """What the pipeline must know of the model that is being built."""
    defaults = {"sampler": params["sampler"], "num_inference_steps": STEPS, "guidance_scale": params["guidance_scale"]}
    return Model.from_parts(
        "reference", params["family"], params["facts"], job.shapes, inputs["tokenizer"], inputs["tables"],
        {**defaults, **params["size"]},
    )  # fmt: skip


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


def nearest(available: tuple[int, ...], wanted: int) -> int:
    """The number of steps nearest to `wanted` that the tables hold; the smaller of two."""
    return min(available, key=lambda n: (abs(n - wanted), n))


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


class Recorder:
    """An engine that shows every call, feeds and outputs, to `tap`."""

    def __init__(self, engine: Engine, tap: Callable[[Arrays, Arrays], None]) -> None:
        self.inputs, self.outputs, self.facts = engine.inputs, engine.outputs, engine.facts
        self._engine, self._tap = engine, tap

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._engine(feeds)
        self._tap(feeds, outputs)
        return outputs

    def close(self) -> None:
        self._engine.close()


@dataclass
class _Recording:
    """What has been kept so far; of the denoiser only some steps, of the others every call."""

    denoiser: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    arrays: dict[str, dict[str, NDArray[np.generic]]] = field(default_factory=dict)
    bytes: int = 0
    left_out: int = 0
    timesteps: tuple[float, ...] = ()
    _trajectory: Trajectory | None = None
    _kept: Mapping[int, str] = field(default_factory=dict)
    _step: int = 0

    def begin(self, trajectory: Trajectory, pipeline: Pipeline, number: int) -> None:
        calls = pipeline.table(trajectory.sampler, trajectory.num_inference_steps).calls
        self.timesteps = tuple(call.timestep for call in calls)
        self._trajectory, self._kept, self._step = trajectory, kept_steps(len(calls), number), 0

    def resume(self, trajectory: Trajectory) -> None:
        """Go on with what belongs to a trajectory that was run before."""
        self._trajectory = trajectory

    def tap(self, component: str, feeds: Arrays, outputs: Arrays) -> None:
        when: dict[str, Any] = {"step": None, "timestep": None, "region": None}
        if component == self.denoiser:
            step, self._step = self._step, self._step + 1
            if step not in self._kept:
                return
            when = {"step": step, "timestep": float(self.timesteps[step]), "region": self._kept[step]}
        self._keep(component, when, feeds, outputs)

    def _keep(self, component: str, when: Mapping[str, Any], feeds: Arrays, outputs: Arrays) -> None:
        trajectory = self._trajectory
        assert trajectory is not None
        size = sum(array.nbytes for array in (*feeds.values(), *outputs.values()))
        have = any(row["component"] == component and row["shape"] == trajectory.shape for row in self.rows)
        if have and self.bytes + size > BUDGET_BYTES:
            self.left_out += 1
            return
        self.bytes += size
        mine = self.arrays.setdefault(component, {})
        name = f"{sum(row['component'] == component for row in self.rows):03d}"
        mine |= {f"{name}.in.{key}": array.copy() for key, array in feeds.items()}
        mine |= {f"{name}.out.{key}": array.copy() for key, array in outputs.items()}
        self.rows.append({
            "id": name, "component": component, "trajectory": trajectory.id,
            "prompt": " | ".join(dict.fromkeys(trajectory.prompts)), "negative_prompt": trajectory.negative_prompt,
            **when, "shape": trajectory.shape,
        })  # fmt: skip


@dataclass(frozen=True)
class _Reference:
    """A reference engine on disk, and how to open it."""

    folder: Path

    def open(self) -> Engine:
        return BACKENDS["reference"].open(self.folder, Host())


def _references(family: Family, inputs: Mapping[str, Path], job: Job, scratch: Path) -> dict[str, _Reference]:
    wanted = {name: family.folders[name] for name in job.params["components"]}
    configs = {folder: _config(inputs[folder]) for folder in set(family.folders.values()) if folder in inputs}
    specs: Mapping[str, ComponentSpec] = family.components(configs)
    made = {}
    for name, folder in wanted.items():
        target = scratch / name
        target.mkdir()
        params = {"family": family.name, **job.params["components"][name]}
        BACKENDS["reference"].build(inputs[folder], target, Job(name, params, spec=specs[name], shapes=job.shapes))
        made[name] = _Reference(target)
    return made


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _open(references: Mapping[str, _Reference], recording: _Recording, component: str) -> Recorder:
    return Recorder(references[component].open(), partial(recording.tap, component))


def _run(pipeline: Pipeline, trajectory: Trajectory, say: Callable[[int], None]) -> Arrays:
    """{"latents" (unit noise), "final" (latents), "images" (B, H, W, 3)} of one trajectory."""
    import numpy as np

    final: list[NDArray[np.float32]] = []

    def on_step(_pipeline: Pipeline, step: int, _timestep: float, state: dict[str, Any]) -> None:
        say(step)
        final[:] = [state["latents"]]

    output = pipeline(**trajectory.call(), output_type="np", callback_on_step_end=on_step)
    noise = randn(output.request.latent_shape(pipeline.model), trajectory.seed)
    return {"latents": noise, "final": final[0], "images": np.asarray(output.images)}


def _encode(
    references: Mapping[str, _Reference],
    recording: _Recording,
    planned: list[Trajectory],
    images: Mapping[str, Arrays],
    job: Job,
) -> None:
    """Feed the finished images, (B, 3, H, W) in [-1, 1], to the VAE encoder."""
    import numpy as np

    job.say("reference: encoding the images", None)
    engine = _open(references, recording, "vae_encoder")
    try:
        for trajectory in planned:
            recording.resume(trajectory)
            pixels = np.ascontiguousarray(images[trajectory.id]["images"].transpose(0, 3, 1, 2)) * 2 - 1
            engine({engine.inputs[0].name: pixels.astype(np.float32)})
    finally:
        engine.close()


def _say_step(job: Job, number: int, count: int, steps: int, step: int) -> None:
    done = (number + (step + 1) / steps) / count
    job.say(f"reference image {number + 1} of {count}, step {step + 1} of {steps}", done)


def _write(out: Path, recording: _Recording, planned: list[Trajectory], images: Mapping[str, Arrays]) -> None:
    for component, arrays in recording.arrays.items():
        samples.write_arrays(out, component, arrays)
    samples.write_arrays(
        out, samples.IMAGES, {f"{name}.{key}": array for name, group in images.items() for key, array in group.items()}
    )
    samples.write_index(out, recording.rows, [asdict(t) for t in planned], recording.left_out)
