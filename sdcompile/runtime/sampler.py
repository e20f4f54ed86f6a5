"""The one loop that samples with any compiled table. It knows no scheduler and no engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from sdcompile.errors import RecipeError, StageError
from sdcompile.runtime.tables import NOISE, OUTPUT, STATE, Call, Table
from sdcompile.runtime.values import EarlyStop

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


Denoise = Callable[["Floats", int, "NDArray[np.intp]"], "Floats"]
"""(model input (n, C, h, w), call index, which n of the N images these are) -> guided model output (n, C, h, w)."""

OnStep = Callable[[int, float, "Floats"], "Floats | None"]
"""(call index, timestep, latents after the call) -> latents to go on with, or None to keep them."""

OnStopped = Callable[["NDArray[np.intp]", int], None]
"""(images that stopped early, calls they took)."""


def sample(
    table: Table,
    denoise: Denoise,
    noise: Floats,
    draw: Callable[[], Floats] | None = None,
    on_step: OnStep | None = None,
    *,
    clean: Floats | None = None,
    early_stop: EarlyStop | None = None,
    on_stopped: OnStopped | None = None,
) -> Floats:
    """Run `table` from unit `noise` (N, C, h, w) float32; returns the final latents, same shape.

    `draw` gives unit noise of the same shape, in the order a generator would draw it; it is only
    called by stochastic samplers. `clean` are the latents of a picture to begin with, for a table
    that begins at a later step. An image that `early_stop` finishes ends on its predicted clean
    latents and is denoised no more; the others go on. Sums are taken in float64. Memory: as many
    latents as the table looks back.

    Raises StageError naming the step when the model output or the latents are not finite.
    """
    start = noise.astype(np.float64) * table.init_scale
    latents = (start if clean is None else start + clean.astype(np.float64) * table.clean_scale).astype(np.float32)
    stochastic = table.is_stochastic
    history: tuple[deque[Floats], ...] = tuple(deque(maxlen=max(table.lag(k), 0) + 1) for k in (STATE, OUTPUT, NOISE))
    active, finished = np.arange(len(latents)), np.empty_like(latents)
    before: Floats | None = None
    for index, call in enumerate(table.calls):
        model_input = latents if call.scale == 1.0 else (latents * np.float64(call.scale)).astype(np.float32)
        output = _scattered(denoise(model_input[active], index, active), active, latents.shape)
        _require_finite(output, "the denoiser's output", index, call, table)
        if early_stop is not None and call.clean is not None:
            predicted = (call.clean[0] * latents.astype(np.float64) + call.clean[1] * output).astype(np.float32)
            if before is not None and index + 1 >= early_stop.min_steps and index + 1 < len(table.calls):
                still = _change(before, predicted)[active] < early_stop.threshold
                finished[active[still]] = predicted[active[still]]
                if still.any() and on_stopped is not None:
                    on_stopped(active[still], index + 1)
                active = active[~still]
                if not active.size:
                    return finished
            before = predicted
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
    finished[active] = latents[active]
    return finished


def _scattered(part: Floats, active: NDArray[np.intp], shape: tuple[int, ...]) -> Floats:
    """Outputs of the images still denoised, in their places among all; zeros for the others."""
    if len(active) == shape[0]:
        return part
    whole = np.zeros(shape, np.float32)
    whole[active] = part
    return whole


def _change(before: Floats, after: Floats) -> NDArray[np.float64]:
    """Mean squared change of each image, relative to its mean square."""
    axes = tuple(range(1, after.ndim))
    power = np.square(after, dtype=np.float64).mean(axis=axes)
    change = np.square(after.astype(np.float64) - before).mean(axis=axes)
    return np.divide(change, power, out=np.full_like(change, np.inf), where=power > 0)


def _require_finite(array: Floats, what: str, index: int, call: Call, table: Table) -> None:
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise StageError(
            f"{what} at step {index + 1} of {len(table.calls)} (timestep {call.timestep:g}, sampler {table.sampler}) "
            f"holds {bad} of {array.size} values that are NaN or infinite",
            "build the denoiser in a wider precision (bf16 or fp32), or check the model's weights",
        )
