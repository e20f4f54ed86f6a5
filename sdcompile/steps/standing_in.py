"""What verification runs where an engine can be built but not run: the ONNX it was built from, on the CPU.

That the ONNX agrees with the reference says that weights, types and graph are right. It does not
say that the engine is: its arithmetic is another library's. Reports made so say so (`stand_in`), and
carry what is known of the engine itself: the claims its compiler's own layer table bears out (`proof`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdcompile.backends import BACKENDS, STAND_IN
from sdcompile.backends.base import CARD, LAYERS, Card
from sdcompile.backends.trt import layers
from sdcompile.spec import Job
from sdcompile.steps import widening


def build(card: Card, onnx: Path, out: Path) -> Path:
    """Make an engine of the stand-in from the folder `onnx`, for the shapes of `card`; returns `out`.

    Weights are linked. bf16, which the stand-in has no kernels for, is computed in fp32 with every value rounded
    to bf16 (`widening`): what a GPU does, up to the order of its sums. Of an int8 graph the stand-in need not
    compute anything in int8, as nobody gains by it: it is called by the precision of the rest. Raises HostError
    when the stand-in is missing, StageError when it refuses the graph.
    """
    out.mkdir(parents=True)
    params = {**card.params, "options": {}}
    precision = card.params["rest"] if card.precision == "int8" else card.precision
    if precision == "bf16":
        wide = out.with_name(f"{out.name}-wide")
        widening.widen(onnx, wide)
        onnx, precision = wide, "fp32"
    BACKENDS[STAND_IN].build(onnx, out, Job(card.component, params, precision, card.spec, card.shapes))
    return out


def proof(folder: Path) -> dict[str, list[Mapping[str, Any]]]:
    """Target -> the claims of the engine in `folder`, made again from its layer table; {} when it has none."""
    with suppress(FileNotFoundError):
        data = json.loads((folder / LAYERS).read_text(encoding="utf-8"))
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        fused = (card["params"].get("options") or {}).get("fused_attention", True)
        found = layers.claims_again(data, card["precision"], fused_attention=fused)
        return {target: [claim._asdict() for claim in claims] for target, claims in found.items()}
    return {}
