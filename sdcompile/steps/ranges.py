"""Does every half precision value of a graph stay within fp16, on the recorded feeds?

The fp32 graph is run, with the largest magnitude of every value as a further output, and held against the
values that are fp16 in the graph an engine is built from (see `passes.magnitudes`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.passes import magnitudes
from sdcompile.passes.casting import LIMIT
from sdcompile.samples import Samples
from sdcompile.spec import Say

if TYPE_CHECKING:
    import onnx

_NAMED = 10


def check(exported: Path, typed: Path, samples: Samples, scratch: Path, say: Say) -> dict[str, Any] | None:
    """The largest magnitudes of the values that are fp16 in `typed`, as `exported` computes them in fp32.

    Returns {"values", "limit", "largest": {...}, "beyond": [...]}, or None when `typed` holds no fp16.
    """
    import onnx

    halves = _halves(onnx.load(typed / "model.onnx", load_external_data=False))
    graph = onnx.load(exported / "model.onnx", load_external_data=False)
    makers = {output: node.name for node in graph.graph.node for output in node.output if output in halves}
    if not makers:
        return None
    found = magnitudes.largest(exported, list(makers), samples, magnitudes.spread(samples), scratch, say)
    rows = [
        {"node": makers[value], "value": value, "max_abs": float(f"{min(reached, 1e38):.4g}")}
        for value, reached in sorted(found.items(), key=lambda item: -item[1])
    ]
    return {
        "values": len(rows), "limit": LIMIT, "largest": rows[0],
        "beyond": [row for row in rows if row["max_abs"] > LIMIT][:_NAMED],
    }  # fmt: skip


def _halves(graph: onnx.ModelProto) -> set[str]:
    """Names of values that are fp16, and of those that are cast to it: such a cast overflows as well."""
    from onnx import TensorProto

    made = {v.name for v in graph.graph.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT16}
    casts = (node for node in graph.graph.node if node.op_type == "Cast")
    return made | {c.input[0] for c in casts if any(a.name == "to" and a.i == TensorProto.FLOAT16 for a in c.attribute)}
