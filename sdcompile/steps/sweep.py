"""Does an engine give a picture at all, at the smallest, usual and largest of every shape it was built for?

Trajectories are recorded at a few sizes; an overflow may show at another one only. Recorded feeds are
repeated or cut to each shape that was not recorded: there is no reference there, so that what is asked is no
more than finite values that are not all the same, where a NaN becomes a black picture. It knows no library
an engine runs in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile import metrics
from sdcompile.backends import Engine
from sdcompile.backends.base import Card
from sdcompile.samples import Samples
from sdcompile.spec import Say

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]
    Sizes = tuple[tuple[int, ...], ...]

FLAT = 1e-3
"""An output whose values span less than this part of what the reference's span is all one colour."""


def span(outputs: Arrays) -> float:
    """Of all rows (images) of all outputs, the least distance between the largest and the smallest value."""
    return min(float(np.ptp(row.astype(np.float64))) for array in outputs.values() for row in array)


def sizes(card: Card, feeds: Arrays) -> Sizes:
    """The shapes of one call's feeds, in the order of the component's inputs."""
    return tuple(tuple(feeds[tensor.name].shape) for tensor in card.spec.inputs)


def run(
    engine: Engine, card: Card, samples: Samples, recorded: Collection[Sizes], least: float, say: Say
) -> dict[str, Any]:
    """Call `engine` at every shape that is not among `recorded`; `least` is the least `span` of the reference.

    Returns {"shapes": ["max", ...], "calls", "faults": [{"shape", "sample", "dims": {input: [...]}, "kind", "what"}]},
    kind being "nan", "flat" or "error".
    """
    names = list(samples.rows)
    # The first and the last call recorded: of a denoiser, high and low noise.
    chosen = [samples[name] for name in dict.fromkeys((names[0], names[-1]))]
    calls, faults = 0, []
    shapes = {which: dims for which, dims in _shapes(card) if dims not in recorded}
    for which, dims in shapes.items():
        say(f"{which} shape", None)
        for sample in chosen:
            feeds = {
                tensor.name: fitted(sample.feeds[tensor.name], size)
                for tensor, size in zip(card.spec.inputs, dims, strict=True)
            }
            calls += 1
            if (found := _fault(engine, feeds, least)) is not None:
                told = {tensor.name: list(size) for tensor, size in zip(card.spec.inputs, dims, strict=True)}
                faults.append({"shape": which, "sample": sample.told["id"], "dims": told, **found})
    return {"shapes": list(shapes), "calls": calls, "faults": faults}


def _shapes(card: Card) -> Iterator[tuple[str, Sizes]]:
    """min, opt and max of every input, each once."""
    seen: set[Sizes] = set()
    for index, which in enumerate(("min", "opt", "max")):
        dims = tuple(bounds[index] for bounds in card.spec.profile(card.shapes).values())
        if dims not in seen:
            seen.add(dims)
            yield which, dims


def fitted(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """`array` cut, or repeated from its beginning, to `shape`."""
    for axis, size in enumerate(shape):
        array = np.take(array, np.arange(size), axis=axis, mode="wrap")
    return np.ascontiguousarray(array)


def _fault(engine: Engine, feeds: Arrays, least: float) -> dict[str, str] | None:
    try:
        outputs = engine(feeds)
    # As in `verify`: foreign libraries raise what they like, and an engine that fails on a legal shape is a finding.
    except Exception as error:
        return {"kind": "error", "what": f"the engine failed: {type(error).__name__}: {str(error).strip()[:2000]}"}
    if not all(metrics.is_finite(array) for array in outputs.values()):
        return {"kind": "nan", "what": "its output holds NaN or infinite values"}
    if span(outputs) < FLAT * least:
        return {"kind": "flat", "what": "its output is all one value, as a black picture is"}
    return None
