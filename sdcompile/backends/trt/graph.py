"""What an ONNX graph promises of the engine made of it: attentions, int8 layers, layers left in float32.

TensorRT is strongly typed: the graph's types are the engine's. Names are those of the graph's
nodes, which the compiler repeats in its layer table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

_MOVES = {"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators that change no value (or only its type): what is before them is looked at instead."""

FUSED_WIDTHS = range(16, 257)
"""Head widths that TensorRT-RTX 1.7.1 computes in one kernel: tried from 8 to 512, with 64 to 4096 tokens."""

KEPT = "kept"
"""Key of a node's metadata_props under which a pass says why it left the node in float32."""


@dataclass(frozen=True)
class Promise:
    """Names of nodes, by what the engine must make of them.

    attentions   softmaxes that feed a matrix product, over several heads of a width that is fused. Those
                 of a single head (a VAE's) are not counted: whether fusing pays there is the compiler's choice.
                 Nor are those a pass left in float32
    quantized    matrix products and convolutions whose inputs are all dequantised int8
    kept         nodes that a pass left in float32 on purpose
    """

    attentions: frozenset[str]
    quantized: frozenset[str]
    kept: frozenset[str]


def promise(path: Path) -> Promise:
    """Read `path` (a model.onnx) without its weights."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    nodes = graph.node
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.value_info}
    makers = {output: node for node in nodes for output in node.output}
    kept = frozenset(node.name for node in nodes if any(p.key == KEPT for p in node.metadata_props))
    products = [node for node in nodes if node.op_type in PRODUCTS]
    behind = {node.name: [_sources(name, makers) for name in node.input[:2]] for node in products}
    attentions = frozenset(
        source.name
        for node in products
        if _fusible(shapes.get(node.output[0]))
        for side in behind[node.name]
        for source in side
        if source.op_type == "Softmax" and not kept & {source.name, node.name}
    )
    return Promise(
        attentions=attentions,
        quantized=frozenset(
            name
            for name, sides in behind.items()
            if all(side and all(source.op_type == "DequantizeLinear" for source in side) for side in sides)
        ),
        kept=kept,
    )


def _fusible(dims: Sequence[onnx.TensorShapeProto.Dimension] | None) -> bool:
    """Whether an attention's output (B, heads, T, width) says that it has several heads of a width that is fused."""
    return dims is not None and len(dims) == 4 and dims[1].dim_value > 1 and dims[3].dim_value in FUSED_WIDTHS


def _sources(value: str, makers: Mapping[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes that computed `value`, moves, casts and masks seen through; none for inputs and weights."""
    node = makers.get(value)
    if node is None:
        return []
    if node.op_type in _MOVES:
        return _sources(node.input[0], makers)
    if node.op_type == "Where":
        return [source for name in node.input[1:] for source in _sources(name, makers)]
    return [node]
