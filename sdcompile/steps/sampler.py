"""Compile diffusers schedulers into tables, by running each one once on formal basis vectors.

For a number of steps the real scheduler is set up as diffusers does and stepped. At every call
the latents, the model output and each noise draw are fresh unit vectors, so what `step` returns
*is* the row of coefficients. A few more entries of the same vectors carry random numbers and a
zero: a scheduler that clips, thresholds, adapts or brings noise of its own gives itself away
there, and is refused. The room knows no scheduler by name.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin

from sdcompile.errors import RecipeError
from sdcompile.runtime.sampler import NOISE, OUTPUT, STATE, Call, Table, Term, save
from sdcompile.spec import Job

REVISION = 1

_MAGNITUDES = (0.5, 3.0, 30.0, 300.0)
# Schedulers that compute in float32 round each term to 6e-8 of its size; a bent one is off by order 1.
_LINEAR_TOLERANCE = 1e-4
_ROUNDING = 1e-13
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


class NotLinearError(RecipeError):
    """The scheduler is no linear function of latents, outputs and noise: no table can hold it."""


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
        if not _alike(tables[position], prepared.table(tables[position].num_inference_steps, name, probe=1)):
            raise NotLinearError(*_refusal(scheduler, "its coefficients depend on the values of the latents"))
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

    def table(self, num_inference_steps: int, name: str, probe: int = 0) -> Table:
        """`probe` seeds the numbers of the linearity test."""
        # A copy is as good as a fresh one, and some constructors take half a second.
        instance = copy.deepcopy(self.scheduler)
        kind = type(instance).__name__
        with _quiet():
            try:
                instance.set_timesteps(num_inference_steps, device="cpu", **self.for_steps)
                calls = _probe(instance, list(instance.timesteps), self.for_step, probe)
                scale = float(getattr(instance, "init_noise_sigma", 1.0))
            except _SCHEDULER_FAULTS as error:
                raise ImpossibleError(f"{kind} cannot do {num_inference_steps} steps: {error}") from error
        values = [t.value for c in calls for t in c.terms] + [c.scale for c in calls] + [scale]
        if not calls or not np.isfinite(values).all():
            raise ImpossibleError(f"{kind} gives NaN or infinite coefficients for {num_inference_steps} steps")
        return Table(name or kind, num_inference_steps, scale, tuple(calls))


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
        raise NotLinearError(*_refusal(name, f"it has no {' and no '.join(missing)}: it is driven in a way of its own"))
    return found


def _prepare(scheduler: str, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> _Prepared:
    cls = _scheduler_class(scheduler)
    options = {part: set(inspect.signature(getattr(cls, part)).parameters) - _NOT_OPTIONS for part in _PARTS}
    unknown = [key for key in overrides if not any(key in names for names in options.values())]
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(set().union(*options.values())), 1)
        raise RecipeError(
            f"{scheduler} has no setting {unknown[0]!r}",
            f"did you mean {near[0]}?" if near else f"it has: {', '.join(sorted(options['__init__']))}",
        )
    settings = {k: v for k, v in overrides.items() if k in options["__init__"]}
    for_steps = {k: v for k, v in overrides.items() if k in options["set_timesteps"] and k not in settings}
    for_step = {k: v for k, v in {**_STEP_DEFAULTS, **overrides}.items() if k in options["step"] and k not in settings}
    with _quiet():
        try:
            return _Prepared(cls.from_config(dict(config), **settings), for_steps, for_step)
        except _SCHEDULER_FAULTS as error:
            raise RecipeError(f"{scheduler} refuses its config: {error}") from error


def _probe(instance: Any, timesteps: Sequence[torch.Tensor], options: Mapping[str, Any], seed: int) -> list[Call]:
    """Step `instance` on unit vectors and read every row; then hold the rows against the random entries."""
    calls, name = len(timesteps), type(instance).__name__
    rescale = getattr(instance, "scale_model_input", lambda latents, timestep: latents)
    rng = np.random.default_rng(seed)
    width, extra = 4 * calls, len(_MAGNITUDES) + 1

    def fresh(column: int) -> torch.Tensor:
        values = np.zeros(width + extra)
        values[column] = 1.0
        values[width:-1] = rng.standard_normal(len(_MAGNITUDES)) * _MAGNITUDES * (1 + seed)
        vectors[column] = values[width:]
        return torch.from_numpy(values).reshape(1, -1, 1, 1)

    vectors = np.zeros((width, extra))
    drawn: list[int] = []  # calls that drew, one entry a draw; draws take columns 2 * calls onwards

    def draw(
        shape: Sequence[int], generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
    ) -> torch.Tensor:
        if tuple(shape) != (1, width + extra, 1, 1) or len(drawn) >= 2 * calls:
            raise NotLinearError(*_refusal(name, "it draws noise of another shape than the latents"))
        drawn.append(len(rows))
        return fresh(2 * calls + len(drawn) - 1).to(dtype or torch.float64)

    rows: list[Call] = []
    with _stepping(draw, type(instance)):
        for index, timestep in enumerate(timesteps):
            latents, output = fresh(index), fresh(calls + index)
            scaled = rescale(latents, timestep)
            scale = float(scaled[0, index, 0, 0])
            _require_linear(name, scaled, {index: scale}, vectors, "the model's input")
            after = instance.step(output, timestep, latents, **options).prev_sample
            row = after.reshape(-1)[:width].double().numpy()
            keep = np.flatnonzero(np.abs(row) > _ROUNDING * np.abs(row).max())
            _require_linear(name, after, {int(c): float(row[c]) for c in keep}, vectors, "the result of a step")
            terms = tuple(_term(int(column), float(row[column]), index, calls, len(drawn)) for column in keep)
            clean = _clean(instance, float(timestep), scale)
            rows.append(Call(float(timestep), scale, drawn.count(index), terms, clean))
    return rows


def _term(column: int, value: float, index: int, calls: int, draws: int) -> Term:
    if column < calls:
        return Term(STATE, index - column, value)
    if column < 2 * calls:
        return Term(OUTPUT, index - (column - calls), value)
    return Term(NOISE, draws - 1 - (column - 2 * calls), value)


def _require_linear(name: str, found: torch.Tensor, row: Mapping[int, float], vectors: np.ndarray, what: str) -> None:
    """Hold the random and the zero entries of `found` against what `row` says they must be."""
    actual = found.reshape(-1)[len(vectors) :].double().numpy()
    parts = np.array([value * vectors[column] for column, value in row.items()]).reshape(len(row), -1)
    allowed = _LINEAR_TOLERANCE * np.abs(parts).sum(axis=0)
    off = np.abs(actual - parts.sum(axis=0))
    if not np.isfinite(actual).all():
        return  # NaN coefficients make the number of steps impossible; the caller says so
    if off[-1] > 0:
        raise NotLinearError(*_refusal(name, f"it adds noise of its own, or a constant, to {what}"))
    if (off > allowed).any():
        raise NotLinearError(*_refusal(name, f"{what} is clipped, thresholded or otherwise bent by the values in it"))


def _refusal(scheduler: str, reason: str) -> tuple[str, str]:
    return (
        f"{scheduler} with these settings cannot be compiled to a table: {reason}",
        "switch off clip_sample and thresholding, as in `samplers: [{name: ddim, scheduler: DDIMScheduler, "
        "clip_sample: false}]`, or choose another scheduler",
    )


def _clean(instance: Any, timestep: float, scale: float) -> tuple[float, float] | None:
    """(p, q) with clean = p * latents + q * output, from the training schedule and the prediction type.

    Between training timesteps log sigma is interpolated, as diffusers maps sigmas to timesteps.
    """
    alphas = getattr(instance, "alphas_cumprod", None)
    if alphas is None or not 0 <= timestep <= len(alphas) - 1:
        return None
    levels = alphas.double().clamp(min=1e-12).numpy()
    log_sigma = np.interp(timestep, np.arange(len(levels)), 0.5 * np.log((1 - levels) / levels))
    signal, noise = 1 / np.hypot(1, np.exp(log_sigma)), 1 / np.hypot(1, np.exp(-log_sigma))
    kind = getattr(instance.config, "prediction_type", "epsilon")
    if kind == "epsilon":
        return float(scale / signal), float(-noise / signal)
    if kind == "v_prediction":
        return float(scale * signal), float(-noise)
    return (0.0, 1.0) if kind == "sample" else None


def _alike(one: Table, other: Table) -> bool:
    if [(t.kind, t.lag) for c in one.calls for t in c.terms] != [(t.kind, t.lag) for c in other.calls for t in c.terms]:
        return False
    first, second = (np.array([t.value for c in table.calls for t in c.terms]) for table in (one, other))
    return bool(np.allclose(first, second, rtol=_LINEAR_TOLERANCE, atol=0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence diffusers' remarks on configs; what matters of them is in `left_out.json`."""
    logging = diffusers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


class _DoubleTorch:
    """torch, with float64 in the place of float32: for schedulers that cast the latents down to float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def _stepping(draw: Any, cls: type) -> Iterator[None]:
    """Let the scheduler's modules draw from `draw` instead of a random generator, and compute in float64.

    Only around `step`: the schedule itself keeps the precision that diffusers gives it. Casts to
    float32 matter where large terms cancel (a zero-SNR Euler starts at sigma 4096).
    """
    modules = [vars(module) for module in {sys.modules[c.__module__] for c in cls.__mro__}]
    patches = {"randn_tensor": draw, "torch": _DoubleTorch()}
    originals = [
        (names, key, names[key])
        for names in modules
        if names["__name__"].startswith("diffusers.")
        for key in patches
        if key in names
    ]
    for names, key, _ in originals:
        names[key] = patches[key]
    try:
        yield
    finally:
        for names, key, original in originals:
            names[key] = original
