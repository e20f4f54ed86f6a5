"""What verification runs where an engine can be built but not run: the ONNX it was built from, on the CPU.

That the ONNX agrees with the reference says that weights, types and graph are right. It does not
say that the engine is: its arithmetic is another library's. Reports made so say so (`stand_in`), and
carry what is known of the engine itself: the claims its compiler's own layer table bears out (`proof`).

A machine that builds engines need not have the memory to compute in fp32 what they compute on a GPU: large calls are
made a few rows at a time (`calculator.POSITIONS`), weights are widened as they are read, and that rows do not depend on
each other is shown by the fp32 graph (`whole`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile import metrics
from sdcompile.backends import BACKENDS, STAND_IN, Engine, Host
from sdcompile.backends.base import CARD, LAYERS, Card, read_card
from sdcompile.backends.trt import layers
from sdcompile.passes import calculator
from sdcompile.runtime.batches import in_parts
from sdcompile.samples import Samples
from sdcompile.spec import Job, Range, Say, range_of
from sdcompile.steps import widening

if TYPE_CHECKING:
    from numpy.typing import NDArray

# ONNX Runtime widens fp16 weights for good when it optimizes a graph for its own layouts too ("all"): of the UNet of
# SD 1.5 a call took 7.0 GiB then, and takes 4.7 (one row), a tenth slower.
_OPTIONS = {"graph_optimization": "extended"}


def build(card: Card, onnx: Path, out: Path) -> Path:
    """Make an engine of the stand-in from the folder `onnx`, for the shapes of `card`; returns `out`.

    Weights are linked. bf16, which the stand-in has no kernels for, is computed in fp32 with every value rounded
    to bf16 (`widening`): what a GPU does, up to the order of its sums. Of an int8 graph the stand-in need not
    compute anything in int8, as nobody gains by it: it is called by the precision of the rest. Raises HostError
    when the stand-in is missing, StageError when it refuses the graph.
    """
    out.mkdir(parents=True)
    params = {**card.params, "options": _OPTIONS}
    precision = card.params["rest"] if card.precision == "int8" else card.precision
    if precision == "bf16":
        wide = out.with_name(f"{out.name}-wide")
        widening.widen(onnx, wide)
        onnx, precision = wide, "fp32"
    BACKENDS[STAND_IN].build(onnx, out, Job(card.component, params, precision, card.spec, card.shapes))
    return out


class _ByRows:
    """An engine that is called with as many rows at once as `calculator.POSITIONS` allows."""

    def __init__(self, engine: Engine, card: Card) -> None:
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self._engine, self._fixed = engine, _takes_one_number_of_rows(card)

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._engine.facts

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self._fixed:
            return self._engine(feeds)
        rows = calculator.rows_at_once([array.shape for array in feeds.values()])
        return in_parts(self._engine, {tensor.name: feeds[tensor.name] for tensor in self.inputs}, Range(1, 1, rows))

    def close(self) -> None:
        self._engine.close()


def _takes_one_number_of_rows(card: Card) -> bool:
    rows = card.spec.inputs[0].dims[0]
    return isinstance(rows, int) or range_of(rows, card.shapes).is_static


def _open(folder: Path, host: Host) -> Engine:
    return _ByRows(BACKENDS[STAND_IN].open(folder, host), read_card(folder, STAND_IN))


BACKEND = replace(BACKENDS[STAND_IN], open=_open)


def whole(exported: Path, samples: Samples, say: Say) -> dict[str, Any] | None:
    """Does the fp32 graph answer rows at once as it answers them in the parts that `BACKEND` makes of them?

    One row more is enough than such a part has, and takes little more memory, however many a call has. What passes
    add afterwards (pairs, casts) knows no rows. Returns that of one sample of each shape which differs
    most, {"sample", "rows", "snr_db", "floor_db", "passed"}, or None where no call is made in parts.
    """
    session, floor = calculator.session(exported / "model.onnx"), metrics.FLOORS["fp32"].min_snr_db
    names, inputs = [output.name for output in session.get_outputs()], [t.shape for t in session.get_inputs()]
    found: dict[str, dict[str, Any]] = {}
    for name, told in samples.rows.items():
        shapes = [shape for key, shape in samples.shapes(name).items() if key.startswith("in.")]
        first, *others = calculator.parts(shapes, inputs)
        if told["shape"] in found or not others:
            continue
        rows = first.stop + 1
        feeds = {key: array[:rows] for key, array in samples[name].feeds.items()}
        say(f"the fp32 graph on {rows} rows at once, and in parts", None)
        apart = zip(*(session.run(names, part) for part in calculator.calls(session, feeds)), strict=True)
        level = min(map(metrics.snr_db, map(np.concatenate, apart), session.run(names, feeds)))
        found[told["shape"]] = {
            "sample": name, "rows": rows, "snr_db": round(level, 3), "floor_db": floor, "passed": level >= floor,
        }  # fmt: skip
    return min(found.values(), key=lambda row: row["snr_db"], default=None)


def proof(folder: Path) -> dict[str, list[Mapping[str, Any]]]:
    """Target -> the claims of the engine in `folder`, made again from its layer table; {} when it has none."""
    with suppress(FileNotFoundError):
        data = json.loads((folder / LAYERS).read_text(encoding="utf-8"))
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        fused = (card["params"].get("options") or {}).get("fused_attention", True)
        found = layers.claims_again(data, card["precision"], fused_attention=fused)
        return {target: [claim._asdict() for claim in claims] for target, claims in found.items()}
    return {}
