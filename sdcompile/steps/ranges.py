"""Does every half precision value of a graph stay within fp16, on the recorded feeds?

A CPU computes fp16 graphs in fp32, so an overflow that a GPU would meet does not show in their
outputs. Here the fp32 graph is run instead, with the largest magnitude of every value as a further
output, and held against the values that are fp16 in the graph an engine is built from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.backends import BACKENDS, STAND_IN, Host
from sdcompile.backends.base import Card
from sdcompile.files import link
from sdcompile.samples import Sample, Samples
from sdcompile.spec import ComponentSpec, Job, Say, TensorSpec

if TYPE_CHECKING:
    import onnx

LIMIT = 65504.0
"""The largest fp16."""

MASK = 1e30
"""Values from here on stand for infinity in attention masks (as in `passes.cast_fp16`), and are meant."""

_NAMED = 10


def check(exported: Path, typed: Path, card: Card, samples: Samples, scratch: Path, say: Say) -> dict[str, Any] | None:
    """The largest magnitudes of the values that are fp16 in `typed`, as `exported` computes them in fp32.

    Returns {"values", "limit", "largest": {...}, "beyond": [...]}, or None when `typed` holds no fp16.
    """
    import onnx

    halves = _halves(onnx.load(typed / "model.onnx", load_external_data=False))
    graph = onnx.load(exported / "model.onnx", load_external_data=False)
    makers = {output: node.name for node in graph.graph.node for output in node.output if output in halves}
    if not makers:
        return None
    chosen = list(_chosen(samples))
    largest = dict.fromkeys(makers, 0.0)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="ranges-") as folder:
        engine = BACKENDS[STAND_IN].open(_probe(graph, list(makers), exported, card, Path(folder)), Host())
        try:
            for number, sample in enumerate(chosen):
                say(f"ranges, sample {number + 1} of {len(chosen)}", number / len(chosen))
                answers = engine(sample.feeds)
                for index, value in enumerate(makers):
                    found = float(answers[f"largest_{index}"])
                    if found < MASK:
                        largest[value] = max(largest[value], found)
        finally:
            engine.close()
    rows = [
        {"node": makers[value], "value": value, "max_abs": float(f"{found:.4g}")}
        for value, found in sorted(largest.items(), key=lambda item: -item[1])
    ]
    return {
        "values": len(rows), "limit": LIMIT, "largest": rows[0],
        "beyond": [row for row in rows if row["max_abs"] > LIMIT][:_NAMED],
    }  # fmt: skip


def _halves(graph: onnx.ModelProto) -> set[str]:
    from onnx import TensorProto

    return {v.name for v in graph.graph.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT16}


def _chosen(samples: Samples) -> Iterator[Sample]:
    """One call for every timestep region of every shape."""
    seen: set[tuple[Any, Any]] = set()
    for name, told in samples.rows.items():
        kind = (told["shape"], told["region"])
        if kind not in seen:
            seen.add(kind)
            yield samples[name]


def _probe(graph: onnx.ModelProto, values: list[str], exported: Path, card: Card, folder: Path) -> Path:
    """An engine of the stand-in whose further outputs are the largest magnitudes of `values`; weights are linked."""
    from onnx import TensorProto, helper, save

    source, built = folder / "onnx", folder / "engine"
    source.mkdir()
    built.mkdir()
    for path in exported.glob("model.onnx.*"):
        link(path, source / path.name)
    for index, value in enumerate(values):
        graph.graph.node.append(helper.make_node("Abs", [value], [f"magnitude_{index}"], name=f"magnitude_{index}"))
        graph.graph.node.append(
            helper.make_node(
                "ReduceMax", [f"magnitude_{index}"], [f"largest_{index}"], name=f"largest_{index}", keepdims=0
            )
        )
        graph.graph.output.append(helper.make_tensor_value_info(f"largest_{index}", TensorProto.FLOAT, []))
    save(graph, source / "model.onnx")
    extra = tuple(TensorSpec(f"largest_{index}", (), "float32") for index in range(len(values)))
    spec = ComponentSpec(card.component, card.spec.inputs, (*card.spec.outputs, *extra))
    BACKENDS[STAND_IN].build(
        source, built, Job(card.component, {**card.params, "options": {}}, "fp32", spec, card.shapes)
    )
    return built
