"""Compile diffusers schedulers into tables, by running each one once on formal basis vectors.

For a number of steps the real scheduler is set up as diffusers does and stepped (`probing`); what
is no linear function of latents, outputs and noise is refused. The room knows no scheduler by name.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from diffusers import SchedulerMixin

from sdcompile.errors import RecipeError
from sdcompile.runtime.tables import Table, save
from sdcompile.spec import Job
from sdcompile.steps.probing import NotLinearError, alike, probe, quiet, refusal, starts

REVISION = 1

_GIVEN = ("timesteps", "sigmas")
_PARTS = ("__init__", "set_timesteps", "step")
# StableDiffusionPipeline always passes eta=0 to schedulers whose step takes it.
_STEP_DEFAULTS = {"eta": 0.0}
_NOT_OPTIONS = {
    "self", "args", "kwargs", "model_output", "timestep", "sample", "generator", "return_dict", "variance_noise",
    "num_inference_steps", "device", "timesteps", "sigmas", "noise",
}  # fmt: skip
# What a scheduler raises when it cannot be set up for a number of steps.
_SCHEDULER_FAULTS = (
    ValueError, IndexError, RuntimeError, ZeroDivisionError, TypeError, AttributeError, NotImplementedError,
    AssertionError, KeyError, ImportError,
)  # fmt: skip


class ImpossibleError(RecipeError):
    """The scheduler itself cannot do this number of steps."""


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Compile `job.params["samplers"]` for each of `job.params["num_inference_steps"]`.

    Reads `inputs["source"]`/scheduler/scheduler_config.json. Writes one <name>.npz each,
    samplers.json, and left_out.json with the reason of each number of steps a scheduler cannot do.

    Raises RecipeError for an unknown scheduler or setting, one that is not linear, or one that can
    do none of the step counts.
    """
    counts = [int(n) for n in job.params["num_inference_steps"]]
    index: dict[str, Any] = {}
    left_out: dict[str, dict[str, str]] = {}
    rows = job.params["samplers"]
    for position, row in enumerate(rows):
        name, overrides = row["name"], dict(row.get("config") or {})
        job.say(f"{name} ({row['scheduler']})", position / len(rows))
        source = source_config(inputs["source"], row["scheduler"])
        try:
            tables, reasons = tables_for(row["scheduler"], source, overrides, counts, name=name)
        except RecipeError as error:
            raise type(error)(f"sampler {name}: {error.message}", error.hint) from error
        save(out, name, tables)
        index[name] = {
            "scheduler": row["scheduler"],
            "config": overrides,
            "num_inference_steps": [t.num_inference_steps for t in tables],
        }
        if reasons:
            left_out[name] = {str(n): reason for n, reason in reasons.items()}
    for file, content in (("samplers.json", index), ("left_out.json", left_out)):
        (out / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def source_config(source: Path, scheduler: str = "") -> dict[str, Any]:
    """The scheduler config of the diffusers folder `source`, as diffusers hands it to `scheduler`.

    StableDiffusionPipeline sets steps_offset to 1 and clip_sample to False where its own scheduler
    has another value. Where such a value is only the class's default, `from_config` forgets it
    again: a class switched to takes its own default, so the mend holds for the source's own class.
    """
    path = source / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(
            f"the source has no scheduler config: {path} is missing", "copy scheduler/ from the model's own repository"
        ) from error
    except ValueError as error:
        raise RecipeError(f"{path} is no JSON: {error}") from error
    seen = config
    if scheduler and scheduler == config.get("_class_name") and hasattr(diffusers, scheduler):
        parameters = inspect.signature(getattr(diffusers, scheduler).__init__).parameters
        seen = {key: p.default for key, p in parameters.items() if p.default is not p.empty} | config
    if seen.get("clip_sample", False) is True:
        config["clip_sample"] = False
    if seen.get("steps_offset", 1) != 1:
        config["steps_offset"] = 1
    return config


def tables_for(
    scheduler: str, source: Mapping[str, Any], overrides: Mapping[str, Any], counts: Sequence[int], name: str = ""
) -> tuple[list[Table], dict[int, str]]:
    """The tables of one sampler for `counts`, and why some counts have none (see `table`)."""
    prepared = _prepare(scheduler, source, overrides)
    if prepared.given:
        counts = [prepared.given[1]]
    tables: list[Table] = []
    reasons: dict[int, str] = {}
    for count in counts:
        try:
            tables.append(prepared.table(count, name))
        except ImpossibleError as error:
            reasons[count] = error.message
    if not tables:
        first = next(iter(reasons.values()), "no number of steps was asked for")
        raise RecipeError(f"{scheduler} can do none of the asked numbers of steps: {first}")
    # Coefficients that changed with the probe's numbers would not be coefficients.
    for position in {len(tables) // 2, len(tables) - 1}:
        if not alike(tables[position], prepared.table(tables[position].num_inference_steps, name, seed=1)):
            raise NotLinearError(*refusal(scheduler, "its coefficients depend on the values of the latents"))
    return tables, reasons


def table(
    scheduler: str, config: Mapping[str, Any], num_inference_steps: int, overrides: Mapping[str, Any] | None = None
) -> Table:
    """Compile `scheduler` (a diffusers class name), set up with `from_config(config, **overrides)`.

    `overrides` may also hold options of the scheduler's `step` and `set_timesteps` (TCD's and
    DDIM's eta, LCM's original_inference_steps).

    Raises RecipeError (unknown class or setting), NotLinearError or ImpossibleError.
    """
    return tables_for(scheduler, config, overrides or {}, [num_inference_steps], scheduler)[0][0]


@dataclass(frozen=True)
class _Prepared:
    """A scheduler as `from_config` leaves it, and the options for its set_timesteps and step."""

    scheduler: Any
    for_steps: Mapping[str, Any]
    for_step: Mapping[str, Any]

    @property
    def given(self) -> tuple[str, int] | None:
        """What the recipe says of the timesteps themselves, and how many there are."""
        return next(((key, len(self.for_steps[key])) for key in _GIVEN if key in self.for_steps), None)

    def table(self, num_inference_steps: int, name: str, seed: int = 0) -> Table:
        """`seed` seeds the numbers of the linearity test."""
        # A copy is as good as a fresh one, and some constructors take half a second.
        instance = copy.deepcopy(self.scheduler)
        kind = type(instance).__name__
        with quiet():
            try:
                count = {} if self.given else {"num_inference_steps": num_inference_steps}
                instance.set_timesteps(**count, device="cpu", **self.for_steps)
                fresh = copy.deepcopy(instance)
                calls = probe(instance, list(instance.timesteps), self.for_step, seed)
                begun = starts(fresh, calls, self.for_step, seed)
                scale = float(getattr(instance, "init_noise_sigma", 1.0))
            except _SCHEDULER_FAULTS as error:
                raise ImpossibleError(f"{kind} cannot do {num_inference_steps} steps: {error}") from error
        values = [t.value for c in calls for t in c.terms] + [c.scale for c in calls] + [scale]
        if not calls or not np.isfinite(values).all():
            raise ImpossibleError(f"{kind} gives NaN or infinite coefficients for {num_inference_steps} steps")
        return Table(name or kind, num_inference_steps, scale, tuple(calls), begun)


def _scheduler_class(name: str) -> Any:
    found = getattr(diffusers, name, None)
    lacking = getattr(found, "_backends", None)  # diffusers' stand-in for a class whose library is missing
    if isinstance(found, type) and lacking and not issubclass(found, SchedulerMixin):
        raise RecipeError(f"{name} needs what is not all installed: {', '.join(lacking)}", "choose another scheduler")
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
        near = difflib.get_close_matches(name, known, 1)
        raise RecipeError(
            f"{name!r} is no scheduler of diffusers {diffusers.__version__}",
            f"did you mean {near[0]}?" if near else "see diffusers.schedulers for the class names",
        )
    missing = [part for part in _PARTS if not hasattr(found, part)]
    if missing:
        raise NotLinearError(*refusal(name, f"it has no {' and no '.join(missing)}: it is driven in a way of its own"))
    return found


def _prepare(scheduler: str, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> _Prepared:
    cls = _scheduler_class(scheduler)
    options = {part: set(inspect.signature(getattr(cls, part)).parameters) - _NOT_OPTIONS for part in _PARTS}
    given = [key for key in _GIVEN if key in overrides]
    taken = inspect.signature(cls.set_timesteps).parameters
    for key in given:
        if key not in taken or len(given) > 1:
            able = [k for k in _GIVEN if k in taken]
            raise RecipeError(
                f"{scheduler} does not take {' and '.join(given)}", f"it takes: {', '.join(able) or 'none'}"
            )
    unknown = [key for key in overrides if key not in given and not any(key in names for names in options.values())]
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(set().union(*options.values())), 1)
        raise RecipeError(
            f"{scheduler} has no setting {unknown[0]!r}",
            f"did you mean {near[0]}?" if near else f"it has: {', '.join(sorted(options['__init__']))}",
        )
    settings = {k: v for k, v in overrides.items() if k in options["__init__"]}
    for_steps = {k: v for k, v in overrides.items() if k in options["set_timesteps"] and k not in settings}
    for_steps |= {k: list(v) for k, v in overrides.items() if k in _GIVEN}
    for_step = {k: v for k, v in {**_STEP_DEFAULTS, **overrides}.items() if k in options["step"] and k not in settings}
    with quiet():
        try:
            return _Prepared(cls.from_config(dict(config), **settings), for_steps, for_step)
        except _SCHEDULER_FAULTS as error:
            raise RecipeError(f"{scheduler} refuses its config: {error}") from error
