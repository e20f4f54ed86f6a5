"""Run the fp32 torch reference on denoising trajectories and show every call of every component.

The runtime's own pipeline runs with the reference's engines, each wrapped in a `Recorder`: what is
shown is what the runtime feeds. Which calls are kept, and for what, is `record`'s and `calibrate`'s
business. It knows no backend but the reference.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile.backends import BACKENDS, Engine, Host
from sdcompile.families import FAMILIES, Family
from sdcompile.runtime.images import pixels_from_decoded
from sdcompile.runtime.model import Model
from sdcompile.runtime.noise import randn
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.spec import ComponentSpec, Job

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[np.generic]]

REGIONS = ("early", "mid", "late")

# A scale for the guided runs of a model whose own default is unguided.
GUIDED = 4.0

_DECODER, _ENCODER = "vae_decoder", "vae_encoder"


@dataclass(frozen=True)
class Trajectory:
    """One call of the pipeline: its arguments (`call`), and under which name and shape label it is kept.

    `step_cache` is "off" or an `every`; `like` names the trajectory that differs from it in that alone.
    """

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
    step_cache: int | str = "off"
    like: str | None = None

    @property
    def number(self) -> int:
        return int(self.id.partition("-")[0])

    def shallow_steps(self, calls: int) -> list[int]:
        """Of so many calls of the denoiser, those that reuse deep features."""
        return [step for step in range(calls) if isinstance(self.step_cache, int) and step % self.step_cache]

    def call(self) -> dict[str, Any]:
        """The arguments to give a pipeline, but for output_type."""
        arguments = {k: v for k, v in asdict(self).items() if k not in ("id", "prompts", "shape", "like")}
        return {"prompt": list(self.prompts), **arguments}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Trajectory:
        return cls(**{**row, "prompts": tuple(row["prompts"])})


def with_step_cache(trajectory: Trajectory, every: int) -> Trajectory:
    """The same with cached steps."""
    return replace(trajectory, id=f"{trajectory.id}-cached", step_cache=every, like=trajectory.id)


@dataclass(frozen=True)
class Call:
    """One call of one component. `step` counts the denoiser's calls of a trajectory, of `steps`; None for others.

    A denoiser's shallow stand-in takes part in that count.
    """

    component: str
    trajectory: Trajectory
    step: int | None
    steps: int
    timestep: float | None
    feeds: Arrays
    outputs: Arrays

    @property
    def told(self) -> dict[str, Any]:
        """What the samples form says of it."""
        return {
            "trajectory": self.trajectory.id,
            "prompt": " | ".join(dict.fromkeys(self.trajectory.prompts)),
            "negative_prompt": self.trajectory.negative_prompt,
            "step": self.step,
            "timestep": self.timestep,
            "region": None if self.step is None else region(self.step, self.steps),
            "shape": self.trajectory.shape,
        }


def region(step: int, steps: int) -> str:
    """Which third of a trajectory a step lies in."""
    edges = [round(steps * k / 3) for k in range(1, 3)]
    return REGIONS[sum(step >= edge for edge in edges)]


def model_of(params: Mapping[str, Any], inputs: Mapping[str, Path], job: Job) -> Model:
    """What the pipeline must know of the model that is being built.

    params: family, facts, guidance_scale, sampler, size {height, width}, num_inference_steps (or None).
    """
    defaults = {
        "sampler": params["sampler"], "num_inference_steps": params["num_inference_steps"] or 10,
        "guidance_scale": params["guidance_scale"],
    }  # fmt: skip
    return Model.from_parts(
        "reference", params["family"], params["facts"], job.shapes, inputs["tokenizer"], inputs["tables"],
        {**defaults, **params["size"]},
    )  # fmt: skip


def nearest(available: tuple[int, ...], wanted: int) -> int:
    """The number of steps nearest to `wanted` that the tables hold; the smaller of two."""
    return min(available, key=lambda n: (abs(n - wanted), n))


def play(
    inputs: Mapping[str, Path], job: Job, model: Model, planned: Sequence[Trajectory],
    show: Callable[[Call], None], scratch: Path,
) -> Iterator[tuple[Trajectory, Arrays]]:  # fmt: skip
    """Run each trajectory; yields it with {"latents" (unit noise), "final" (latents), "images" (B, H, W, 3)}.

    inputs: one checkpoint folder per source folder, tokenizer, tables. job.params: family, components
    {name: {params}}, and those of `model_of`. A component "vae_encoder" is fed the finished images,
    (B, 3, H, W) in [-1, 1]. Engines are made in `scratch`.
    """
    family = FAMILIES[job.params["family"]]
    with tempfile.TemporaryDirectory(dir=scratch, prefix="reference-") as folder:
        references = build_references(family, inputs, job, Path(folder))
        for number, trajectory in enumerate(planned):
            tap = _Tap((family.denoiser, family.shallow), trajectory, show)
            # A pipeline of its own, because prompts it met before would not reach the text encoder again.
            with Pipeline(model, partial(_open, references, tap), low_memory=True) as pipeline:
                table = pipeline.table(trajectory.sampler, trajectory.num_inference_steps)
                tap.timesteps = tuple(float(call.timestep) for call in table.calls)
                arrays = _run(pipeline, trajectory, partial(_say_step, job, number, len(planned), len(table.calls)))
                if _ENCODER in references:
                    engine = pipeline.engine(_ENCODER)
                    pixels = arrays["images"].transpose(0, 3, 1, 2) * 2 - 1
                    engine({engine.inputs[0].name: np.ascontiguousarray(pixels, np.float32)})
            yield trajectory, arrays


def decoded_by_source(
    inputs: Mapping[str, Path], job: Job, model: Model, finals: Mapping[str, NDArray[Any]], scratch: Path
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """What the source's own decoder makes of `finals`, where another one is built in its place; else nothing.

    finals: name -> final latents (B, C, h, w). Gives name -> {"source_images": (B, H, W, 3) in [0, 1]}.
    """
    if _DECODER not in inputs:
        return {}
    family = FAMILIES[job.params["family"]]
    job.say("the source's own decoder", None)
    facts = {name: value for name, value in model.facts.items() if name != "decoder"}
    with tempfile.TemporaryDirectory(dir=scratch, prefix="decoder-") as folder:
        others = {role: path for role, path in inputs.items() if role != _DECODER}
        alone = replace(job, params={**job.params, "components": {_DECODER: {}}})
        made = build_references(family, others, alone, Path(folder))
        with Pipeline(
            replace(model, facts=facts), lambda name: BACKENDS["reference"].open(made[name], Host())
        ) as pipeline:
            return {
                name: {"source_images": pixels_from_decoded(pipeline.decode(final))} for name, final in finals.items()
            }


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
class _Tap:
    """Tells the calls of one trajectory apart: the denoiser's come in the order of its timesteps."""

    denoisers: tuple[str, ...]
    trajectory: Trajectory
    show: Callable[[Call], None]
    timesteps: tuple[float, ...] = ()
    _step: int = 0

    def __call__(self, component: str, feeds: Arrays, outputs: Arrays) -> None:
        step = timestep = None
        if component in self.denoisers:
            step, self._step = self._step, self._step + 1
            timestep = self.timesteps[step]
        self.show(Call(component, self.trajectory, step, len(self.timesteps), timestep, feeds, outputs))


def build_references(family: Family, inputs: Mapping[str, Path], job: Job, scratch: Path) -> dict[str, Path]:
    """Component -> folder of its reference engine in `scratch`."""
    reference = BACKENDS["reference"]
    wanted = {name: family.folder(name, inputs) for name in job.params["components"]}
    configs = configs_of(family, inputs)
    specs: Mapping[str, ComponentSpec] = family.components(configs)
    depth = job.params["components"].get(family.denoiser, {}).get("step_cache_depth")
    if depth is not None:
        specs = family.step_cached(configs, specs, depth)
    for name, folder in wanted.items():
        (scratch / name).mkdir()
        params = {"family": family.name, **job.params["components"][name]}
        reference.build(inputs[folder], scratch / name, Job(name, params, spec=specs[name], shapes=job.shapes))
    return {name: scratch / name for name in wanted}


def configs_of(family: Family, inputs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The configs of every checkpoint among `inputs`, by folder."""
    return {folder: _config(inputs[folder]) for folder in {*family.folders.values(), *family.folders} & set(inputs)}


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _open(references: Mapping[str, Path], tap: _Tap, component: str) -> Recorder:
    return Recorder(BACKENDS["reference"].open(references[component], Host()), partial(tap, component))


def _run(pipeline: Pipeline, trajectory: Trajectory, say: Callable[[int], None]) -> Arrays:
    final: list[NDArray[np.float32]] = []

    def on_step(_pipeline: Pipeline, step: int, _timestep: float, state: dict[str, Any]) -> None:
        say(step)
        final[:] = [state["latents"]]

    output = pipeline(**trajectory.call(), output_type="np", callback_on_step_end=on_step)
    noise = randn(output.request.latent_shape(pipeline.model), trajectory.seed)
    return {"latents": noise, "final": final[0], "images": np.asarray(output.images)}


def _say_step(job: Job, number: int, count: int, steps: int, step: int) -> None:
    done = (number + (step + 1) / steps) / count
    job.say(f"reference image {number + 1} of {count}, step {step + 1} of {steps}", done)
