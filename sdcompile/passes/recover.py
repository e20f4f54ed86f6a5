"""Recovery: a short distillation of the pruned model from the unpruned one, on recorded denoising trajectories.

The student learns the teacher's output and what each of its blocks hands on (as BK-SDM, Kim et al. 2023,
arXiv:2305.15798). The teacher answers on the fly, and is asked about more than was recorded: half of the rows get the
conditioning of another row, half get new noise at another timestep, or become pictures where the recipe names
some (`renoising`). No images are needed. The same inputs and steps give the same weights on one machine with as many
threads; a limit in minutes would not, which is why there is none. A recovery that was interrupted goes on from what it
saved last, to the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from sdcompile import metrics
from sdcompile.errors import RecipeError, StageError
from sdcompile.passes import lessons, patterns, pruning, renoising, resuming
from sdcompile.passes.base import Pass, Setting, always, by_modules
from sdcompile.samples import Samples
from sdcompile.spec import Job, Say

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Call = tuple[Tensor, ...]

REVISION = 4

POSITIONS = 8192
"""Latent positions whose gradients are kept at once: 32 rows of 16 x 16, 2 of 64 x 64. More rows come in parts, whose
gradients add up."""

_WARM_UP = 0.05
"""Share of the steps over which the rate rises; then it falls as a cosine to zero."""

_EXAMS = 10
_EXAM_ROWS = 128
"""Held out rows, at most, that say when to stop, and which weights are kept. What was fitted cannot say it: the passes
before have refitted the student to these very rows. A build's floors are held on other trajectories still."""

_SAVE_EVERY_S, _SAVE_SHARE = 60.0, 0.05
"""The state is saved once a minute, but never takes more than this share of the time."""

_ROUNDING_DB = 100.0
"""From here on a student differs from its teacher by fp32 rounding alone: another batch size is enough for that."""


class Params(BaseModel):
    """How long and on what to train."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=300, ge=1, le=100_000, description="Steps of AdamW, at most.")
    rows: int = Field(default=32, ge=1, le=1024, description="Denoiser rows in one step.")
    learning_rate: float = Field(default=3e-4, gt=0, lt=1, description="Highest learning rate.")
    features: float = Field(
        default=0.5, ge=0, le=100, description="Weight of the blocks' outputs beside the model's own."
    )
    mix: float = Field(
        default=0.5, ge=0, le=1, description="Share of the rows that get the conditioning of another row."
    )
    renoise: float = Field(
        default=0.5, ge=0, le=1,
        description="Share of the rows that get new noise, at a timestep that is as noisy or noisier: inputs that were "
        "never recorded. Each such row costs one more answer of the unpruned model. With `calibrate: {pictures: ...}` "
        "those of the usual size become pictures instead, with their captions and noise of any timestep.",
    )  # fmt: skip
    ema: float = Field(default=0.99, ge=0, lt=1, description="Decay of the averaged weights, which are what is kept.")
    patience: int = Field(
        default=5, ge=1, description="Stop when this many tenths of the steps bring nothing on held out rows."
    )
    layers: tuple[str, ...] = Field(
        default=("*",),
        min_length=1,
        description="Modules to train, by path as in `quantize: {ignore: ...}` (`attn2`); fewer take less memory.",
    )
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="Seed of the choice of rows.")


def refuses(params: Params, modules: Mapping[str, str]) -> list[str]:
    names = [f"{path}.{part}" for path in modules for part in ("weight", "bias")]
    fault = patterns.fault_of(names, params.layers, "weight")
    return [f"layers: {fault}"] if fault else []


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Train the checkpoint in `inputs["checkpoint"]` towards `inputs["teacher"]`, into `out`."""
    params = Params.model_validate({name: job.params[name] for name in Params.model_fields})
    student = pruning.open_subject(inputs["checkpoint"], job)
    teacher = pruning.open_subject(inputs["teacher"], job)
    training = pruning.calls_of(Samples(inputs["samples"], job.component, held_out=False), job)
    questions = _questions(Samples(inputs["samples"], job.component, held_out=True), job)
    assert job.spec is not None
    schedule = renoising.schedule_of(inputs["assets"]) if params.renoise else None
    names = [tensor.name for tensor in job.spec.inputs]
    pictures = renoising.pictures_of(inputs["pictures"], names) if "pictures" in inputs else None
    exams = distil(student, teacher, training, questions, params, "recover", job.say, job.state, schedule, pictures)
    pruning.finish(inputs, out, job, student, [], steps=exams)


@dataclass
class _Training:
    """Everything that decides how a training goes on after `step`.

    trained   the weights being trained; `average` of them is examined, `best` was the average of the best exam
    exams     {"step", "snr_db"} on held out rows, the first before any training; `since` the best one: how many
    """

    trained: Mapping[str, nn.Parameter]
    average: dict[str, Tensor]
    best: dict[str, Tensor]
    optimiser: torch.optim.AdamW
    random: torch.Generator
    exams: list[dict[str, float]]
    step: int = 0
    since: int = 0

    @property
    def top_db(self) -> float:
        return max(exam["snr_db"] for exam in self.exams)

    def save(self, folder: Path) -> None:
        tensors = {"random": self.random.get_state()}
        for name, weight in self.trained.items():
            tensors |= {
                f"weight/{name}": weight,
                f"average/{name}": self.average[name],
                f"best/{name}": self.best[name],
            }
            tensors |= {f"{key}/{name}": value for key, value in self.optimiser.state[weight].items()}
        resuming.save(folder, tensors, {"step": self.step, "since": self.since, "exams": self.exams})


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What torch's AdamW keeps of each weight."""


def distil(
    student: pruning.Subject,
    teacher: pruning.Subject,
    training: Sequence[Call],
    questions: Sequence[tuple[Call, Tensor]],
    params: Params,
    field: str,
    say: Say,
    state: Path | None = None,
    schedule: renoising.Schedule | None = None,
    pictures: renoising.Pictures | None = None,
) -> list[dict[str, float]]:
    """Train `student` in place on the rows of `training`; returns its exams: step and SNR in dB on the `questions`.

    What is kept are the averaged weights of the best exam, or the weights as they came when none was better. Rows are
    noised again, or become `pictures` with noise, where the `schedule` is known. What is needed to go on is saved in
    the folder `state`, where one is given, and taken from there. Raises StageError when the loss is no longer finite.
    """

    trained = _trained(student.model, params.layers, field)
    now = _begin(trained, params, state)
    say(f"going on after step {now.step} of {params.steps}" if now.step else "training", now.step / params.steps)
    if not now.exams:
        now.exams.append({"step": 0, "snr_db": _exam(student.module, questions)})
    if now.exams[0]["snr_db"] >= _ROUNDING_DB:
        return now.exams  # nothing was lost
    draws = _draws(training, params, now.random)
    begun, start = now.step, time.monotonic()
    saved, took = start, 0.0
    while now.step < params.steps and now.since < params.patience:
        call = next(draws)
        if schedule is not None and pictures is not None and pictures.fit(call):
            call = renoising.shown(call, params.renoise, schedule, pictures, now.random)
        elif schedule is not None:
            call = renoising.renoised(call, params.renoise, schedule, partial(_answers, teacher), now.random)
        _learn(now, student, teacher, call, params, field)
        if not now.step % max(1, params.steps // _EXAMS) or now.step == params.steps:
            _examine(now, student, questions)
        left_s = (time.monotonic() - start) / (now.step - begun) * (params.steps - now.step)
        line = f"step {now.step} of {params.steps}, {now.top_db:.1f} dB (from {now.exams[0]['snr_db']:.1f})"
        say(f"{line}, {_duration(left_s)} left", now.step / params.steps)
        if state is not None and _is_due(time.monotonic() - saved, took):
            begin = time.monotonic()
            now.save(state)
            saved = time.monotonic()
            took = saved - begin
    for name, weight in trained.items():
        weight.data = now.best[name]
    student.model.requires_grad_(False)
    return now.exams


def _begin(trained: Mapping[str, nn.Parameter], params: Params, state: Path | None) -> _Training:
    """A training at its start, or as it was when it was saved in the folder `state`."""
    import torch

    optimiser = torch.optim.AdamW(trained.values(), lr=params.learning_rate, weight_decay=0.0)
    random = torch.Generator().manual_seed(params.seed)
    found = None if state is None else resuming.restore(state)
    if found is None:
        average, best = ({name: weight.detach().clone() for name, weight in trained.items()} for _ in range(2))
        return _Training(trained, average, best, optimiser, random, [])
    tensors, told = found
    random.set_state(tensors.pop("random"))
    average, best = {}, {}
    for name, weight in trained.items():
        weight.data, average[name], best[name] = (tensors.pop(f"{key}/{name}") for key in ("weight", "average", "best"))
        optimiser.state[weight] = {key: tensors.pop(f"{key}/{name}") for key in _MOMENTS}
    return _Training(trained, average, best, optimiser, random, told["exams"], told["step"], told["since"])


def _is_due(since_s: float, took_s: float) -> bool:
    """Is it time to save, `since_s` after the last time, which took `took_s`?"""
    return since_s >= max(_SAVE_EVERY_S, took_s / _SAVE_SHARE)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _learn(
    now: _Training, student: pruning.Subject, teacher: pruning.Subject, call: Call, params: Params, field: str
) -> None:
    """One step of AdamW, and of the average. The loss is the mean over parts of up to `POSITIONS`, by their rows."""
    import torch

    now.step += 1
    for group in now.optimiser.param_groups:
        group["lr"] = params.learning_rate * _share(now.step, params.steps)
    for part in pruning.parts_of(call, POSITIONS):
        loss = lessons.loss(student, teacher, part, params.features) * (len(part[0]) / len(call[0]))
        if not torch.isfinite(loss):
            raise StageError(f"training diverged at step {now.step}", f"lower {field}.learning_rate")
        loss.backward()
    torch.nn.utils.clip_grad_norm_(now.trained.values(), 1.0)
    now.optimiser.step()
    now.optimiser.zero_grad(set_to_none=True)
    # Young averages forget faster, or they would remember where the training began.
    decay = min(params.ema, now.step / (now.step + 10))
    for name, weight in now.trained.items():
        now.average[name].lerp_(weight.detach(), 1 - decay)


def _answers(teacher: pruning.Subject, call: Call) -> Tensor:
    import torch

    with torch.no_grad():
        return torch.cat([teacher.module(*part) for part in pruning.parts_of(call, POSITIONS)])


def _examine(now: _Training, student: pruning.Subject, questions: Sequence[tuple[Call, Tensor]]) -> None:
    """Measure the average, and keep it when it is the best so far."""
    top = now.top_db
    with _weights(now.trained, now.average):
        now.exams.append({"step": now.step, "snr_db": _exam(student.module, questions)})
    now.since += 1
    if now.top_db > top:
        now.since = 0
        now.best = {name: weight.clone() for name, weight in now.average.items()}


def _trained(model: nn.Module, wanted: Sequence[str], field: str) -> dict[str, nn.Parameter]:
    """The parameters to train, as copies: the checkpoint's own are mapped and must not be written to."""
    weights = dict(model.named_parameters())
    if fault := patterns.fault_of(weights, wanted, "weight"):
        raise RecipeError(f"{field}.layers: {fault}", patterns.HINT)
    found = patterns.named(weights, wanted)
    chosen = {name: weight for name, weight in weights.items() if name in found}
    for weight in chosen.values():
        weight.data = weight.data.clone()
        weight.requires_grad_(True)
    return chosen


def _share(step: int, steps: int) -> float:
    """Of the highest rate: a linear rise, then half a cosine."""
    rise = max(1, round(_WARM_UP * steps))
    return min(step / rise, 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))


def _draws(training: Sequence[Call], params: Params, random: torch.Generator) -> Iterator[Call]:
    """Endless calls of `params.rows` rows of one shape, each shape as often as it has rows.

    Past latents and timesteps, the inputs are conditioning, which some rows get from another row.
    """
    import torch

    groups: dict[tuple[Any, ...], list[tuple[Call, int]]] = {}
    for call in training:
        table = groups.setdefault(tuple(column.shape[1:] for column in call), [])
        table += [(call, place) for place in range(len(call[0]))]
    tables = list(groups.values())
    sizes = torch.tensor([float(len(table)) for table in tables])
    while True:
        table = tables[int(torch.multinomial(sizes, 1, generator=random))]
        rows = torch.randint(len(table), (params.rows,), generator=random)
        others = torch.randint(len(table), (params.rows,), generator=random)
        told = torch.where(torch.rand(params.rows, generator=random) < params.mix, others, rows)
        columns = ((column, rows if column < 2 else told) for column in range(len(table[0][0])))
        yield tuple(torch.stack([table[row][0][at][table[row][1]] for row in of.tolist()]) for at, of in columns)


def _questions(samples: Samples, job: Job) -> list[tuple[Call, Tensor]]:
    """Up to `_EXAM_ROWS` held out rows with the reference's answers, evenly of all.

    Raises StageError where none is held out.
    """
    if not len(samples):
        raise StageError(
            f"{job.component}: no sample is held out, so nothing says when to stop",
            "raise `calibrate: {images: ...}` (every fourth trajectory is held out) or `max_samples`",
        )
    import torch

    pairs = pruning.pairs_of(samples, job)
    sizes = [len(answers) for _, answers in pairs]
    count = min(_EXAM_ROWS, sum(sizes))
    wanted = torch.zeros(sum(sizes), dtype=torch.bool)
    wanted[[number * sum(sizes) // count for number in range(count)]] = True
    # Copies, so that the rest is let go.
    return [
        (tuple(column[rows] for column in call), answers[rows])
        for (call, answers), rows in zip(pairs, wanted.split(sizes), strict=True)
        if rows.any()
    ]


def _exam(module: nn.Module, pairs: Sequence[tuple[Call, Tensor]]) -> float:
    """SNR in dB over all rows."""
    import torch

    signal = noise = 0.0
    with torch.no_grad():
        for call, answers in pairs:
            signal += float(answers.double().square().sum())
            noise += float((module(*call) - answers).double().square().sum())
    return round(min(10 * math.log10(signal / noise), metrics.IDENTICAL_DB), 3) if noise else metrics.IDENTICAL_DB


@contextmanager
def _weights(trained: Mapping[str, nn.Parameter], others: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with `others` in place of its trained weights."""
    own = {name: weight.data for name, weight in trained.items()}
    for name, weight in trained.items():
        weight.data = others[name]
    try:
        yield
    finally:
        for name, weight in trained.items():
            weight.data = own[name]


def _working_gib(params: Params, setting: Setting) -> float:
    return pruning.gradients_gib(setting, params.rows, POSITIONS)


def _share_trained(params: Params, setting: Setting) -> float:
    """How much of the weights is trained; all of it where they are not known."""
    named = patterns.named(setting.counts, params.layers)
    return sum(setting.counts[name] for name in named) / sum(setting.counts.values()) if named else 1.0


def _memory(params: Params, setting: Setting) -> tuple[float, float]:
    """Weights, gradients, moments, average and best of what is trained; the rest is mapped, as the teacher is."""
    return 1.5 + 5.5 * _share_trained(params, setting), 2.0


def _disk(params: Params, setting: Setting) -> float:
    """The result, and the state twice while a new one takes the place of the old: weights, average, best, moments."""
    return 1.0 + 10.0 * _share_trained(params, setting)


def _wants(params: Params) -> tuple[str, ...]:
    return ("teacher", "assets", "pictures") if params.renoise else ("teacher",)


PASS = Pass(
    name="recover",
    stage="prune",
    kind="checkpoint",
    revision=REVISION,
    params=Params,
    run=run,
    refuses=by_modules(refuses),
    packages=("torch", "diffusers"),
    calibrates=always,
    # Whether the floors hold is said by what it recovers from: by itself it has nothing to learn.
    exact=True,
    wants=_wants,
    memory=_memory,
    working=_working_gib,
    disk=_disk,
)
