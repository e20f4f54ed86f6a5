"""Fit a table of few steps to the trajectories of a many-step teacher.

A table is numbers, so it can be optimised for one model, guidance scale and number of steps. Two
stages, both on the guided outputs of the real denoiser:

1. For a grid of timesteps, step by step: the coefficients of a step are the least-squares solution
   that leads from the student's own latents and outputs to the teacher's latents at the next
   timestep (the optimal linear subspace of Duan et al., arXiv:2305.14677). Several grids are tried.
2. All coefficients and timesteps together, against the teacher's final latents: Gauss-Newton with
   Levenberg's damping (the global objective of S4S, arXiv:2502.17423, and of bespoke solvers,
   arXiv:2310.19075). The Jacobian is taken by finite differences, so that no gradient is needed of
   the denoiser; a change at a late step re-runs only the steps behind it.

It knows numpy and a denoiser function; it refuses to know where prompts and weights come from.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdcompile.runtime.sampler import sample
from sdcompile.runtime.tables import OUTPUT, STATE, Call, Table, Term
from sdcompile.spec import Say, say_nothing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]

Model = Callable[["Floats", float], "Floats"]
"""(variance-preserving latents (N, C, h, w), timestep) -> guided model output of the N images."""

# How far back a fitted step looks: its own output and two before it, as third-order multistep samplers do.
LAGS = 3
# Spacings tried: timesteps of the teacher at fractions u^p of its road, from dense at the start to dense at the end.
POWERS = (0.8, 1.0, 1.25, 1.6)
ITERATIONS = 3
_DAMPINGS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
# Finite differences: a thousandth of a coefficient's scale, and two of a thousand timesteps.
_COEFFICIENT_STEP, _TIMESTEP_STEP = 1e-3, 2.0
# Relative errors below this (70 dB) are as good as none.
_LEAST = 1e-7


@dataclass(frozen=True)
class Teacher:
    """A recorded trajectory: timesteps, the variance-preserving latents at each, the final latents, the clean facts.

    clean   (p, q) per timestep: the predicted clean latents are p * latents + q * output
    """

    timesteps: tuple[float, ...]
    states: tuple[Floats, ...]
    final: Floats
    clean: tuple[tuple[float, float] | None, ...]


@dataclass(frozen=True)
class Student:
    """What is fitted: `coefficients[i]` are those of the latents and of the outputs i, i-1, i-2 at step i."""

    timesteps: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]

    def vector(self) -> Doubles:
        return np.array([*self.timesteps, *(c for row in self.coefficients for c in row)])

    def at(self, vector: Doubles) -> Student:
        """A student of the same shape with the values of `vector`."""
        count, rows, place = len(self.timesteps), [], len(self.timesteps)
        for row in self.coefficients:
            rows.append(tuple(vector[place : place + len(row)].tolist()))
            place += len(row)
        return Student(tuple(vector[:count].tolist()), tuple(rows))

    def first_step_of(self) -> list[int]:
        """For every entry of `vector`, the first step it changes."""
        return [*range(len(self.timesteps)), *(i for i, row in enumerate(self.coefficients) for _ in row)]


def record(table: Table, model: Model, noise: Floats) -> Teacher:
    """Run a deterministic `table` and keep its trajectory."""
    states: list[Floats] = []

    def denoise(model_input: Floats, index: int, images: NDArray[np.intp]) -> Floats:
        states.append(model_input)
        return model(model_input, table.calls[index].timestep)

    final = sample(table, denoise, noise)
    clean = tuple(None if call.clean is None else (call.clean[0] / call.scale, call.clean[1]) for call in table.calls)
    return Teacher(tuple(call.timestep for call in table.calls), tuple(states), final, clean)


def fit(
    teacher: Teacher, base: Table, model: Model, noise: Floats, *, iterations: int = ITERATIONS, say: Say = say_nothing
) -> Student:
    """The student of len(base.calls) steps that comes nearest to the teacher's final latents from `noise`."""
    steps = len(base.calls)
    best: Student | None = None
    most = -np.inf
    for number, indices in enumerate(grids(teacher, base, steps)):
        say(f"least squares on spacing {number + 1}", None)
        student, final = along(teacher, indices, model, noise)
        if (reached := snr_db(final, teacher.final)) > most:
            best, most = student, reached
    assert best is not None
    for number in range(iterations):
        say(f"refining, round {number + 1} of {iterations}", None)
        better = _gauss_newton(best, teacher, model, noise)
        if better is None:
            break
        best = better
    return best


def grids(teacher: Teacher, base: Table, steps: int) -> list[tuple[int, ...]]:
    """Places in the teacher's trajectory for the student's calls: the base's own, and spacings to the same end."""
    last = len(teacher.timesteps) - 1
    own = tuple(int(np.argmin(np.abs(np.array(teacher.timesteps) - call.timestep))) for call in base.calls)
    end = own[-1]
    fractions = np.arange(steps) / max(1, steps - 1)
    spaced = [tuple(np.rint(end * fractions**power).astype(int).tolist()) for power in POWERS]
    found = [grid for grid in dict.fromkeys([own, *spaced]) if len(set(grid)) == steps and max(grid) <= last]
    return found or [tuple(range(steps))]


def along(teacher: Teacher, indices: Sequence[int], model: Model, noise: Floats) -> tuple[Student, Floats]:
    """Least squares step by step along the student's own trajectory; the student and its final latents."""
    latents, outputs, rows = noise.astype(np.float64), list["Floats"](), []
    targets = [teacher.states[i] for i in indices[1:]] + [teacher.final]
    for index, target in zip(indices, targets, strict=True):
        outputs.insert(0, model(latents.astype(np.float32), teacher.timesteps[index]))
        features = np.stack([latents.ravel(), *(o.ravel().astype(np.float64) for o in outputs[:LAGS])])
        gram = features @ features.T
        # A trace of ridge, for outputs that are nearly alike when steps are close together.
        gram += np.eye(len(gram)) * 1e-7 * np.trace(gram)
        row = np.linalg.solve(gram, features @ target.ravel().astype(np.float64))
        latents = (row @ features).reshape(latents.shape)
        rows.append(tuple(row.tolist()))
    timesteps = tuple(teacher.timesteps[i] for i in indices)
    return Student(timesteps, tuple(rows)), latents.astype(np.float32)


def errors(found: Floats | Doubles, wanted: Floats) -> Doubles:
    """Of each image, the squared error relative to the image's power."""
    axes = tuple(range(1, wanted.ndim))
    error = np.square(found.astype(np.float64) - wanted).sum(axis=axes)
    power: Doubles = np.square(wanted, dtype=np.float64).sum(axis=axes)
    return error / power


def snr_db(found: Floats | Doubles, wanted: Floats) -> float:
    """Mean over images of the signal-to-noise ratio in dB: what is maximised."""
    return float(-10 * np.log10(errors(found, wanted) + _LEAST).mean())


Kept = list[tuple["Doubles", list["Floats"]]]
"""Before each step of a run: the latents, and the outputs so far, newest first."""


def _run(student: Student, model: Model, noise: Floats, kept: Kept | None = None, first: int = 0) -> Doubles:
    """Final latents; with `kept`, goes on from what an earlier run knew before step `first`, or fills it when empty."""
    latents, outputs = noise.astype(np.float64), list["Floats"]()
    if kept and first:
        latents, outputs = kept[first][0], list(kept[first][1])
    for index in range(first, len(student.timesteps)):
        if kept is not None and len(kept) == index and not first:
            kept.append((latents, list(outputs)))
        outputs.insert(0, model(latents.astype(np.float32), student.timesteps[index]))
        row = student.coefficients[index]
        latents = row[0] * latents
        for coefficient, output in zip(row[1:], outputs, strict=False):
            latents = latents + coefficient * output.astype(np.float64)
    return latents


def _gauss_newton(student: Student, teacher: Teacher, model: Model, noise: Floats) -> Student | None:
    """One round; None when no damping improves.

    Images are weighed by what they are off now, so that the gradient is that of the mean SNR in dB:
    the few whose trajectories part from the teacher's early do not decide for the others.
    """
    kept: Kept = []
    start = _run(student, model, noise, kept)
    weights = _weights(start, teacher.final)
    vector, count = student.vector(), len(student.timesteps)
    columns = []
    for place, first in enumerate(student.first_step_of()):
        step = _TIMESTEP_STEP if place < count else _COEFFICIENT_STEP * max(0.1, abs(vector[place]))
        moved = vector.copy()
        moved[place] += step
        columns.append(((_run(student.at(moved), model, noise, kept, first) - start) * weights).ravel() / step)
    jacobian = np.stack(columns)
    normal, slope = jacobian @ jacobian.T, jacobian @ ((start - teacher.final) * weights).ravel()
    best, most = None, snr_db(start, teacher.final)
    for damping in _DAMPINGS:
        change = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-12), -slope)
        moved = vector + change
        # Where the model was trained, and the teacher began.
        moved[:count] = moved[:count].clip(0.0, teacher.timesteps[0])
        tried = student.at(moved)
        if all(a > b for a, b in itertools.pairwise(tried.timesteps)):
            reached = snr_db(_run(tried, model, noise), teacher.final)
            if reached > most:
                best, most = tried, reached
    return best


def _weights(found: Doubles, wanted: Floats) -> Doubles:
    power = np.square(wanted, dtype=np.float64).sum(axis=(1, 2, 3))
    return (1 / np.sqrt(power * (errors(found, wanted) + _LEAST)))[:, None, None, None]


def table_of(student: Student, name: str, teacher: Teacher) -> Table:
    """The student as a table, for latents of unit variance; clean facts are read off the teacher's."""
    calls = []
    for timestep, row in zip(student.timesteps, student.coefficients, strict=True):
        terms = (Term(STATE, 0, row[0]), *(Term(OUTPUT, lag, value) for lag, value in enumerate(row[1:])))
        calls.append(Call(timestep, 1.0, 0, terms, _clean_at(teacher, timestep)))
    return Table(name, len(calls), 1.0, tuple(calls))


def _clean_at(teacher: Teacher, timestep: float) -> tuple[float, float] | None:
    known = [(t, c) for t, c in zip(teacher.timesteps, teacher.clean, strict=True) if c is not None]
    if len(known) < len(teacher.timesteps):
        return None
    known.sort()
    times = [t for t, _ in known]
    return (
        float(np.interp(timestep, times, [c[0] for _, c in known])),
        float(np.interp(timestep, times, [c[1] for _, c in known])),
    )
