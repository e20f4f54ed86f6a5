"""Compiled samplers: tables of coefficients, and the files they are kept in.

A diffusers scheduler is, for a given number of steps, linear in the latents it is handed, the
model outputs and the noise it draws. One denoiser call `m` of a table therefore says

    model input   = scale * s[m]                    at `timestep`
    s[m + 1]      = sum of value * (s[m - lag] | output[m - lag] | the draw `lag` draws ago)

where s[0] = init_scale * unit noise and s[-1] are the finished latents. The rows are local (they
look back a few calls, never to the start), so tables can be cut, joined, stopped early, and go on
exactly as diffusers does when a callback replaces the latents. The room knows no scheduler:
`steps.sampler` makes the tables, `sampler` runs them.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdcompile.errors import BundleError, RecipeError

STATE, OUTPUT, NOISE = 0, 1, 2
"""What a term multiplies: the latents before a call, the model output of a call, a noise draw."""

FORMAT = 2


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
class Start:
    """How to begin a table at a later step: with noised clean latents, and no outputs to look back at.

    index         the first call
    clean, noise  the latents before it: clean * (clean latents) + noise * (unit noise)
    lead          calls that take the place of those from `index` on, until enough outputs are there
    """

    index: int
    clean: float
    noise: float
    lead: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Table:
    """A sampler compiled for one number of steps. `len(calls)` exceeds it for second-order samplers.

    starts       how to begin after 0, 1, 2 ... steps; () when not compiled
    clean_scale  what clean latents given to `sample` are scaled by; 0 for a table that begins in noise
    """

    sampler: str
    num_inference_steps: int
    init_scale: float
    calls: tuple[Call, ...]
    starts: tuple[Start, ...] = ()
    clean_scale: float = 0.0

    def lag(self, kind: int) -> int:
        """How far back the terms of `kind` look; -1 when there are none."""
        return max((t.lag for call in self.calls for t in call.terms if t.kind == kind), default=-1)

    @property
    def is_stochastic(self) -> bool:
        return self.lag(NOISE) >= 0


def save(folder: Path, name: str, tables: Iterable[Table]) -> Path:
    """Write the tables of one sampler, one per number of steps, as `<name>.npz`. The bytes depend on them alone."""
    ordered = sorted(tables, key=lambda t: t.num_inference_steps)
    starts = [start for table in ordered for start in table.starts]
    # The leads of the starts lie behind the calls of all tables.
    calls = [call for part in (ordered, starts) for record in part for call in _own_calls(record)]
    terms = [term for call in calls for term in call.terms]
    path = folder / f"{name}.npz"
    np.savez(
        path,
        format=np.array(FORMAT, np.uint8),
        steps=np.array([t.num_inference_steps for t in ordered], np.uint16),
        init_scales=np.array([t.init_scale for t in ordered], np.float64),
        call_counts=np.array([len(t.calls) for t in ordered] + [len(s.lead) for s in starts], np.uint16),
        start_counts=np.array([len(t.starts) for t in ordered], np.uint16),
        start_indices=np.array([s.index for s in starts], np.uint16),
        start_scales=np.array([(s.clean, s.noise) for s in starts], np.float64).reshape(-1, 2),
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
                raise BundleError(
                    f"{path} has table format {int(archive['format'])}; this sdcompile reads {FORMAT}",
                    "rebuild the bundle with this version, or use the version that made it",
                )
            steps = archive["steps"]
            where = np.flatnonzero(steps == num_inference_steps)
            if not where.size:
                raise RecipeError(
                    f"sampler {name} is compiled for {spans(steps.tolist())} steps, not for {num_inference_steps}",
                    f"ask for one of these, or rebuild with sampler_steps up to {num_inference_steps} in the recipe",
                )
            position = int(where[0])
            columns = {key: archive[key] for key in archive.files}
            return Table(
                sampler=name,
                num_inference_steps=num_inference_steps,
                init_scale=float(columns["init_scales"][position]),
                calls=tuple(_calls(columns, position)),
                starts=tuple(_starts(columns, position)),
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise BundleError(f"{path} is missing or damaged: {error}", "copy the bundle again, or rebuild it") from error


def _own_calls(record: Table | Start) -> tuple[Call, ...]:
    return record.calls if isinstance(record, Table) else record.lead


def _starts(columns: Mapping[str, np.ndarray], position: int) -> Iterator[Start]:
    counts = columns["start_counts"].astype(np.int64)
    first = int(counts[:position].sum())
    for number in range(first, first + int(counts[position])):
        clean, noise = columns["start_scales"][number].tolist()
        lead = tuple(_calls(columns, len(counts) + number))
        yield Start(int(columns["start_indices"][number]), clean, noise, lead)


def _calls(columns: Mapping[str, np.ndarray], position: int) -> Iterator[Call]:
    counts = columns["call_counts"].astype(np.int64)
    first = int(counts[:position].sum())
    mine = slice(first, first + int(counts[position]))
    ends = np.cumsum(columns["term_counts"].astype(np.int64))
    begin = int(ends[first - 1]) if first else 0
    kinds, lags, values = (columns[key] for key in ("kinds", "lags", "values"))
    told = (columns[key][mine].tolist() for key in ("timesteps", "scales", "draws", "clean"))
    for end, timestep, scale, draws, clean in zip(ends[mine].tolist(), *told, strict=True):
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
