"""Run a diffusers scheduler on formal basis vectors and read off the coefficients of its steps.

At every call the latents, the model output and each noise draw are fresh unit vectors, so what
`step` returns *is* the row of coefficients. A few more entries of the same vectors carry random
numbers and a zero: a scheduler that clips, thresholds, adapts or brings noise of its own gives
itself away there, and is refused. The room knows no scheduler by name, and no file.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import torch

from sdcompile.errors import RecipeError
from sdcompile.runtime.tables import NOISE, OUTPUT, STATE, Call, Start, Table, Term

_MAGNITUDES = (0.5, 3.0, 30.0, 300.0)
# Schedulers that compute in float32 round each term to 6e-8 of its size; a bent one is off by order 1.
_LINEAR_TOLERANCE = 1e-4
_ROUNDING = 1e-13
# For so many calls a scheduler begun at a later step may differ from one that came there. A few look back
# to their beginning at every step (UniPC, SA); to begin one later would take a table of its own each time.
_LEAD = 3
# Schedulers that compute in float32 give the same coefficient with another rounding.
_SAME = 1e-5


class NotLinearError(RecipeError):
    """The scheduler is no linear function of latents, outputs and noise: no table can hold it."""


def starts(fresh: Any, calls: Sequence[Call], options: Mapping[str, Any], seed: int) -> tuple[Start, ...]:
    """How to begin at every later step, as diffusers' img2img does: `set_begin_index` and `add_noise`.

    Empty for a scheduler that cannot, and for one that looks back further than _LEAD calls.
    """
    if not hasattr(fresh, "add_noise"):
        return ()
    timesteps, found = list(fresh.timesteps), []
    # Without memory a step is the same however one came there.
    memory = any(term.lag for call in calls for term in call.terms)
    for index in range(0, len(timesteps), getattr(fresh, "order", 1)):
        instance = copy.deepcopy(fresh)
        if hasattr(instance, "set_begin_index"):
            instance.set_begin_index(index)
        basis = torch.eye(2, dtype=torch.float64).reshape(2, 1, 2, 1, 1)
        clean, noise = instance.add_noise(basis[0], basis[1], fresh.timesteps[index : index + 1]).flatten().tolist()
        lead: tuple[Call, ...] = ()
        if memory and index:
            rows = probe(copy.deepcopy(instance), timesteps[index:][: _LEAD + 1], options, seed)
            differs = [n for n, row in enumerate(rows) if not _same(row, calls[index + n])]
            lead = tuple(rows[: differs[-1] + 1]) if differs else ()
            if len(lead) > _LEAD:
                return ()
        found.append(Start(index, clean, noise, lead))
    return tuple(found)


def _same(one: Call, other: Call) -> bool:
    """Whether two rows say the same, but for rounding."""
    first, second = ({term[:2]: term.value for term in call.terms} for call in (one, other))
    allowed = _SAME * max(map(abs, first.values()))
    return all(abs(first.get(key, 0.0) - second.get(key, 0.0)) <= allowed for key in first.keys() | second.keys())


def probe(instance: Any, timesteps: Sequence[torch.Tensor], options: Mapping[str, Any], seed: int) -> list[Call]:
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
            raise NotLinearError(*refusal(name, "it draws noise of another shape than the latents"))
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
        raise NotLinearError(*refusal(name, f"it adds noise of its own, or a constant, to {what}"))
    if (off > allowed).any():
        raise NotLinearError(*refusal(name, f"{what} is clipped, thresholded or otherwise bent by the values in it"))


def refusal(scheduler: str, reason: str) -> tuple[str, str]:
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


def alike(one: Table, other: Table) -> bool:
    if [(t.kind, t.lag) for c in one.calls for t in c.terms] != [(t.kind, t.lag) for c in other.calls for t in c.terms]:
        return False
    first, second = (np.array([t.value for c in table.calls for t in c.terms]) for table in (one, other))
    return bool(np.allclose(first, second, rtol=_LINEAR_TOLERANCE, atol=0))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
