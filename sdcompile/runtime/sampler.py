"""The one loop that samples with any compiled table. It knows no scheduler and no engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile.backends import Arrays
from sdcompile.errors import RecipeError, StageError
from sdcompile.runtime.arrays import NUMPY
from sdcompile.runtime.tables import NOISE, OUTPUT, STATE, Call, Table
from sdcompile.runtime.values import EarlyStop

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


Denoise = Callable[[Any, int, "NDArray[np.intp]"], Any]
"""(model input (n, C, h, w), call index, which n of the N images these are) -> guided model output (n, C, h, w)."""

OnStep = Callable[[int, float, Any], Any]
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
    arrays: Arrays = NUMPY,
) -> Floats:
    """Run `table` from unit `noise` (N, C, h, w) float32; returns the final latents, same shape.

    `draw` gives unit noise of the same shape, in the order a generator would draw it; it is only
    called by stochastic samplers. `clean` are the latents of a picture to begin with, for a table
    that begins at a later step. An image that `early_stop` finishes ends on its predicted clean
    latents and is denoised no more; the others go on. Sums are taken in float64. Memory: as many
    latents as the table looks back.

    `denoise` and `on_step` see latents where `arrays` keeps them; `early_stop` looks at them in numpy.

    Raises StageError naming the step when the model output or the latents are not finite.
    """
    start = noise.astype(np.float64) * table.init_scale
    start = (start if clean is None else start + clean.astype(np.float64) * table.clean_scale).astype(np.float32)
    latents = arrays.put(start)
    history: tuple[deque[Any], ...] = tuple(deque(maxlen=max(table.lag(k), 0) + 1) for k in (STATE, OUTPUT, NOISE))
    active, bad = np.arange(len(start)), arrays.counters(2 * len(table.calls))
    stopping = None if early_stop is None else _Stopping(early_stop, start.shape, len(table.calls), on_stopped)
    for index, call in enumerate(table.calls):
        model_input = latents if call.scale == 1.0 else arrays.scaled(latents, call.scale)
        output = denoise(_of(model_input, active), index, active)
        output = output if stopping is None else _scattered(output, active, start.shape)
        arrays.count_bad(output, bad, 2 * index)
        if arrays.known:
            _require_none(bad, table, start.size)
        if stopping is not None:
            active = stopping.still_active(active, call, index, latents, output)
            if not active.size:
                return stopping.finished
        history[STATE].append(latents)
        history[OUTPUT].append(output)
        if table.is_stochastic:
            if draw is None:
                raise RecipeError(f"sampler {table.sampler} draws noise at every step and was given none to draw")
            history[NOISE].extend(arrays.put(draw()) for _ in range(call.draws))
        latents = arrays.weighted([(history[kind][-1 - lag], value) for kind, lag, value in call.terms])
        arrays.count_bad(latents, bad, 2 * index + 1)
        if arrays.known:
            _require_none(bad, table, start.size)
        if on_step is not None:
            replaced = on_step(index, call.timestep, latents)
            latents = latents if replaced is None else replaced
    _require_none(arrays.counted(bad), table, start.size)
    final = arrays.get(latents)
    return final if stopping is None else stopping.ended(active, final)


class _Stopping:
    """Which images are finished early, and on what."""

    def __init__(
        self, rule: EarlyStop, shape: tuple[int, ...], calls: int, on_stopped: OnStopped | None = None
    ) -> None:
        self.finished: Floats = np.empty(shape, np.float32)
        self._rule, self._calls, self._on_stopped = rule, calls, on_stopped
        self._before: Floats | None = None

    def still_active(
        self, active: NDArray[np.intp], call: Call, index: int, latents: Floats, output: Floats
    ) -> NDArray[np.intp]:
        """Those of the images `active` that go on after call `index`."""
        if call.clean is None:
            return active
        predicted = (call.clean[0] * latents.astype(np.float64) + call.clean[1] * output).astype(np.float32)
        before, self._before = self._before, predicted
        if before is None or index + 1 < self._rule.min_steps or index + 1 >= self._calls:
            return active
        still = _change(before, predicted)[active] < self._rule.threshold
        self.finished[active[still]] = predicted[active[still]]
        if still.any() and self._on_stopped is not None:
            self._on_stopped(active[still], index + 1)
        return active[~still]

    def ended(self, active: NDArray[np.intp], latents: Floats) -> Floats:
        self.finished[active] = latents[active]
        return self.finished


def _of(array: Any, active: NDArray[np.intp]) -> Any:
    return array if len(active) == array.shape[0] else array[active]


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


def _require_none(bad: NDArray[np.uint32], table: Table, size: int) -> None:
    """`bad` counts, two for every call: of the denoiser's output, and of the latents after it, of `size` values."""
    if not bad.any():
        return
    first = int(np.flatnonzero(bad)[0])
    index, call = first // 2, table.calls[first // 2]
    what = ("the denoiser's output", "the latents")[first % 2]
    raise StageError(
        f"{what} at step {index + 1} of {len(table.calls)} (timestep {call.timestep:g}, sampler {table.sampler}) "
        f"holds {bad[first]} of {size} values that are NaN or infinite",
        "build the denoiser in a wider precision (bf16 or fp32), or check the model's weights",
    )
