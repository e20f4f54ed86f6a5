"""Compiled samplers: tables of coefficients on disk, and the one loop that samples with any of them.

A diffusers scheduler is, for a given number of steps, linear in the latents it is handed, the
model outputs and the noise it draws. One denoiser call `m` of a table therefore says

    model input   = scale * s[m]                    at `timestep`
    s[m + 1]      = sum of value * (s[m - lag] | output[m - lag] | the draw `lag` draws ago)

where s[0] = init_scale * unit noise and s[-1] are the finished latents. The rows are local (they
look back a few calls, never to the start), so tables can be cut, joined, stopped early, and go on
exactly as diffusers does when a callback replaces the latents. The room knows no scheduler:
`steps.sampler` makes the tables.
"""

from __future__ import annotations

import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sdcompile.errors import BundleError, RecipeError, StageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

STATE, OUTPUT, NOISE = 0, 1, 2
"""What a term multiplies: the latents before a call, the model output of a call, a noise draw."""

FORMAT = 1


class Term(NamedTuple):
    """`value` times the array of `kind` that is `lag` calls (for NOISE: draws) before the newest one."""

    kind: int
    lag: int
    value: float


@dataclass(frozen=True)
class Call:
    """One denoiser call and what becomes of the latents after it.

    timestep   what the denoiser is told
    scale      the denoiser sees scale * latents
    draws      noise tensors drawn after the denoiser ran, before `terms` apply
    terms      the next latents
    clean      (p, q): the predicted clean latents are p * latents + q * output; None when unknown
    """

    timestep: float
    scale: float
    draws: int
    terms: tuple[Term, ...]
    clean: tuple[float, float] | None = None


@dataclass(frozen=True)
class Table:
    """A sampler compiled for one number of steps. `len(calls)` exceeds it for second-order samplers."""

    sampler: str
    num_inference_steps: int
    init_scale: float
    calls: tuple[Call, ...]

    def lag(self, kind: int) -> int:
        """How far back the terms of `kind` look; -1 when there are none."""
        return max((t.lag for call in self.calls for t in call.terms if t.kind == kind), default=-1)

    @property
    def is_stochastic(self) -> bool:
        return self.lag(NOISE) >= 0


Denoise = Callable[["Floats", float], "Floats"]
"""(model input (N, C, h, w), timestep) -> guided model output, same shape."""

OnStep = Callable[[int, float, "Floats"], "Floats | None"]
"""(call index, timestep, latents after the call) -> latents to go on with, or None to keep them."""


def sample(
    table: Table,
    denoise: Denoise,
    noise: Floats,
    draw: Callable[[], Floats] | None = None,
    on_step: OnStep | None = None,
) -> Floats:
    """Run `table` from unit `noise` (N, C, h, w) float32; returns the final latents, same shape.

    `draw` gives unit noise of the same shape, in the order a generator would draw it; it is only
    called by stochastic samplers. Sums are taken in float64. Memory: as many latents as the
    table looks back.

    Raises StageError naming the step when the model output or the latents are not finite.
    """
    latents = (noise.astype(np.float64) * table.init_scale).astype(np.float32)
    stochastic = table.is_stochastic
    history: tuple[deque[Floats], ...] = tuple(deque(maxlen=max(table.lag(k), 0) + 1) for k in (STATE, OUTPUT, NOISE))
    for index, call in enumerate(table.calls):
        model_input = latents if call.scale == 1.0 else (latents * np.float64(call.scale)).astype(np.float32)
        output = denoise(model_input, call.timestep)
        _require_finite(output, "the denoiser's output", index, call, table)
        history[STATE].append(latents)
        history[OUTPUT].append(output)
        if stochastic:
            if draw is None:
                raise RecipeError(f"sampler {table.sampler} draws noise at every step and was given none to draw")
            history[NOISE].extend(draw() for _ in range(call.draws))
        total = np.zeros(latents.shape, np.float64)
        for kind, lag, value in call.terms:
            total += np.multiply(history[kind][-1 - lag], value, dtype=np.float64)
        latents = total.astype(np.float32)
        _require_finite(latents, "the latents", index, call, table)
        if on_step is not None:
            replaced = on_step(index, call.timestep, latents)
            latents = latents if replaced is None else replaced
    return latents


def _require_finite(array: Floats, what: str, index: int, call: Call, table: Table) -> None:
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise StageError(
            f"{what} at step {index + 1} of {len(table.calls)} (timestep {call.timestep:g}, sampler {table.sampler}) "
            f"holds {bad} of {array.size} values that are NaN or infinite",
            "build the denoiser in a wider precision (bf16 or fp32), or check the model's weights",
        )


def save(folder: Path, name: str, tables: Iterable[Table]) -> Path:
    """Write the tables of one sampler, one per number of steps, as `<name>.npz`. The bytes depend on them alone."""
    ordered = sorted(tables, key=lambda t: t.num_inference_steps)
    calls = [call for table in ordered for call in table.calls]
    terms = [term for call in calls for term in call.terms]
    path = folder / f"{name}.npz"
    np.savez(
        path,
        format=np.array(FORMAT, np.uint8),
        steps=np.array([t.num_inference_steps for t in ordered], np.uint16),
        init_scales=np.array([t.init_scale for t in ordered], np.float64),
        call_counts=np.array([len(t.calls) for t in ordered], np.uint16),
        timesteps=np.array([c.timestep for c in calls], np.float64),
        scales=np.array([c.scale for c in calls], np.float64),
        draws=np.array([c.draws for c in calls], np.uint8),
        clean=np.array([c.clean or (np.nan, np.nan) for c in calls], np.float64),
        term_counts=np.array([len(c.terms) for c in calls], np.uint16),
        kinds=np.array([t.kind for t in terms], np.uint8),
        lags=np.array([t.lag for t in terms], np.uint16),
        values=np.array([t.value for t in terms], np.float64),
    )
    return path


def load(folder: Path, name: str, num_inference_steps: int) -> Table:
    """The table of sampler `name` for `num_inference_steps`, from `folder`/`name`.npz.

    Raises RecipeError when the file holds no such number of steps, BundleError when it is
    missing or damaged.
    """
    path = folder / f"{name}.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if int(archive["format"]) != FORMAT:
                raise BundleError(f"{path} has table format {int(archive['format'])}; this sdcompile reads {FORMAT}")
            steps = archive["steps"]
            where = np.flatnonzero(steps == num_inference_steps)
            if not where.size:
                raise RecipeError(
                    f"sampler {name} is compiled for {spans(steps.tolist())} steps, not for {num_inference_steps}",
                    f"ask for one of these, or rebuild with sampler_steps up to {num_inference_steps} in the recipe",
                )
            position = int(where[0])
            return Table(
                sampler=name,
                num_inference_steps=num_inference_steps,
                init_scale=float(archive["init_scales"][position]),
                calls=tuple(_calls(archive, position)),
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise BundleError(f"{path} is missing or damaged: {error}", "copy the bundle again, or rebuild it") from error


def _calls(archive: np.lib.npyio.NpzFile, position: int) -> Iterator[Call]:
    counts = archive["call_counts"].astype(np.int64)
    first = int(counts[:position].sum())
    mine = slice(first, first + int(counts[position]))
    ends = np.cumsum(archive["term_counts"].astype(np.int64))
    begin = int(ends[first - 1]) if first else 0
    kinds, lags, values = (archive[key] for key in ("kinds", "lags", "values"))
    columns = (archive[key][mine].tolist() for key in ("timesteps", "scales", "draws", "clean"))
    for end, timestep, scale, draws, clean in zip(ends[mine].tolist(), *columns, strict=True):
        rows = zip(kinds[begin:end].tolist(), lags[begin:end].tolist(), values[begin:end].tolist(), strict=True)
        known = None if np.isnan(clean[0]) else tuple(clean)
        yield Call(timestep, scale, draws, tuple(Term(*row) for row in rows), known)
        begin = end


def spans(numbers: Iterable[int]) -> str:
    """1, 2, 3, 5 -> "1-3, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
