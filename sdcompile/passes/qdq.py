"""Quantize and dequantize pairs in an ONNX graph: whose they are, taking them out, folding weights, checking them.

A group is a part of the torch module that is quantized or left alone as one: an attention layer, a
feed-forward, a residual block. Every convolution and matrix product belongs to one, by the module
path the exporter kept; a pair belongs to the groups of what it feeds. It knows no quantizer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sdcompile.errors import StageError
from sdcompile.passes import patterns

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

MODULE = "module"
"""Key of a node's metadata that holds its torch module path (see `steps.export_onnx`)."""

TARGETS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})

_MOVES = frozenset({
    "Reshape", "Transpose", "Resize", "Concat", "Slice", "Split", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Pad",
})  # fmt: skip
"""Operators through which a pair still feeds what comes behind them."""

# The parts of diffusers' and transformers' modules that stand or fall together; else the first two names.
_GROUP = re.compile(
    r".*?\b(?:resnets|attentions|downsamplers|upsamplers|layers)\.\d+"
    r"(?:\.transformer_blocks\.\d+\.\w+|\.(?:self_attn|mlp))?"
)


def module_of(node: ir.Node) -> str:
    """The torch module path of a node, without the name of the component around it."""
    path = node.metadata_props.get(MODULE) or str(node.name or "").rpartition("/")[0]
    return path.partition(".")[2] or path


def group_of(path: str) -> str:
    found = _GROUP.match(path)
    return found.group(0) if found else ".".join(path.split(".")[:2])


def targets(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type in TARGETS]


def inside_attentions(graph: ir.Graph) -> set[str]:
    """Names of the products that make attention scores and those that weigh values with them."""
    found = set()
    for softmax in (node for node in graph if node.op_type == "Softmax"):
        found |= {str(node.name) for node in (*_nearest(softmax, up=True), *_nearest(softmax, up=False))}
    return found


_BETWEEN = frozenset({"Add", "Cast", "Div", "Identity", "IsNaN", "Mul", "Where"})
"""Operators between an attention's softmax and its two products: scales, masks and casts."""


def _nearest(node: ir.Node, *, up: bool) -> Iterator[ir.Node]:
    """The products next to `node`, above or below it, with nothing but `_BETWEEN` in between."""
    if up:
        near = [value.producer() for value in node.inputs if value is not None]
    else:
        near = [user for value in node.outputs for user, _ in value.uses()]
    for other in near:
        if other is not None and other.op_type == "MatMul":
            yield other
        elif other is not None and other.op_type in _BETWEEN:
            yield from _nearest(other, up=up)


def matching(nodes: Iterable[ir.Node], wanted: Iterable[str], *, loose: bool = False) -> set[str]:
    """Names of the nodes whose module one of the patterns `wanted` covers (see `patterns`).

    Raises StageError when one covers nothing, unless `loose`.
    """
    rows = [(str(node.name), module_of(node)) for node in nodes]
    paths, wanted = [path for _, path in rows], tuple(wanted)
    if not loose and (fault := patterns.fault_of(paths, wanted, QUANTIZABLE)):
        raise StageError(fault, "`sdcompile sensitivity RECIPE` lists the groups")
    found = patterns.named(paths, wanted)
    return {name for name, path in rows if path in found}


QUANTIZABLE = "module that can be quantized"


def pairs(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node, frozenset[str]]]:
    """(QuantizeLinear, DequantizeLinear, groups they feed), of activations and of weights not folded yet."""
    for node in list(graph):
        if node.op_type == "QuantizeLinear":
            for use in node.outputs[0].uses():
                yield node, use.node, frozenset(group_of(module_of(user)) for user in _fed(use.node))


def _fed(node: ir.Node) -> list[ir.Node]:
    """The convolutions and products that `node` feeds; where it feeds none, the sums and whatever else it feeds."""
    readers = list(_readers(node))
    return [reader for reader in readers if reader.op_type in TARGETS] or readers


def _readers(node: ir.Node) -> Iterator[ir.Node]:
    """What reads the output of `node`, directly, through moves of data or through a further pair (behind a resize)."""
    for user in dict.fromkeys(use.node for use in node.outputs[0].uses()):
        if user.op_type in (*_MOVES, "QuantizeLinear", "DequantizeLinear"):
            yield from _readers(user)
        else:
            yield user


def groups(graph: ir.Graph) -> dict[str, list[str]]:
    """Group -> names of its quantized nodes, in the order of the graph."""
    fed = {node for _, dequantize, _ in pairs(graph) for node in _fed(dequantize)}
    names = {group_of(module_of(node)) for node in fed}
    found: dict[str, list[str]] = {}
    for node in graph:
        group = group_of(module_of(node))
        if group in names and (node.op_type in TARGETS or node in fed):
            found.setdefault(group, []).append(str(node.name))
    return found


def keep_only(model: ir.Model, kept: Collection[str]) -> None:
    """Take out, in place, every pair that feeds no group of `kept`: those groups compute in float again."""
    graph = model.graph
    for quantize, dequantize, fed in list(pairs(graph)):
        if fed.isdisjoint(kept):
            source, value = quantize.inputs[0], dequantize.outputs[0]
            assert source is not None
            for use in list(value.uses()):
                use.node.replace_input_with(use.idx, source)
            graph.remove(dequantize, safe=True)
            if not quantize.outputs[0].uses():
                graph.remove(quantize, safe=True)


def rounded_weights(model: ir.Model, folder: Path, file: str) -> dict[str, ir.ExternalTensor]:
    """Write what every quantized weight is read as, in float32, to `folder/file`; by the name of its QuantizeLinear."""
    import onnx_ir as ir

    found: dict[str, ir.LazyTensor] = {}
    for quantize, _, _ in pairs(model.graph):
        weight = quantize.inputs[0]
        if weight is not None and weight.is_initializer() and str(quantize.name) not in found:
            found[str(quantize.name)] = _rounded(quantize)
    written = ir.external_data.convert_tensors_to_external(list(found.values()), folder, file)
    return dict(zip(found, written, strict=True))


def round_weights(model: ir.Model, rounded: Mapping[str, ir.ExternalTensor]) -> None:
    """Replace, in place, the pair of every weight by what it is read as (`rounded_weights`): nothing is left to
    compute, and where the engine maps files, nothing to hold."""
    import onnx_ir as ir

    graph = model.graph
    for quantize, dequantize, _ in list(pairs(graph)):
        tensor = rounded.get(str(quantize.name))
        if tensor is None:
            continue
        value = graph.initializers.get(str(tensor.name))
        if value is None:
            value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            graph.initializers.add(value)
        for use in list(dequantize.outputs[0].uses()):
            use.node.replace_input_with(use.idx, value)
        graph.remove(dequantize, safe=True)
        if not quantize.outputs[0].uses():
            graph.remove(quantize, safe=True)
    drop_unused(graph)


def _rounded(quantize: ir.Node) -> ir.LazyTensor:
    """(integer - zero point) * scale of a weight, as DequantizeLinear computes it."""
    import numpy as np
    import onnx_ir as ir

    weight, steps, zeros, axis, block_size = _quantization(quantize)

    def make() -> ir.Tensor:
        values = weight.numpy()
        scale, zero_point = (_along(t.numpy(), values.ndim, axis, block_size) for t in (steps, zeros))
        integers = quantized(values, steps.numpy(), zeros.numpy(), axis, block_size).astype(np.float32)
        return ir.Tensor((integers - zero_point.astype(np.float32)) * scale, name=name)

    name = f"{weight.name}_rounded_{quantize.name}"
    return ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape(weight.shape.numpy()), name=name)


def drop_unused(graph: ir.Graph) -> None:
    """Take out, in place, the initializers that nothing reads."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in graph.outputs:
            del graph.initializers[name]


def fold_weights(model: ir.Model) -> None:
    """Replace, in place, every quantized weight by its integers, computed when they are written, tensor by tensor."""
    graph = model.graph
    for quantize, _, _ in list(pairs(graph)):
        weight = quantize.inputs[0]
        if weight is None or not weight.is_initializer() or quantize.outputs[0].name in graph.initializers:
            continue
        folded = _integers(quantize)
        for use in list(quantize.outputs[0].uses()):
            use.node.replace_input_with(use.idx, folded)
        graph.remove(quantize, safe=True)
        graph.initializers.add(folded)
    drop_unused(graph)


def quantized(
    weight: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int, block_size: int = 0
) -> np.ndarray:
    """QuantizeLinear of ONNX: saturate(round_half_even(weight / scale) + zero_point), per tensor, along `axis`, or
    (with a `block_size`) one scale for each block of that many along `axis`."""
    import ml_dtypes
    import numpy as np

    limits = ml_dtypes.iinfo(zero_point.dtype)
    scale, zeros = (_along(values, weight.ndim, axis, block_size) for values in (scale, zero_point.astype(np.float32)))
    levels = np.rint(weight / scale) + zeros
    result: np.ndarray = np.clip(levels, limits.min, limits.max).astype(zero_point.dtype)
    return result


def _along(values: np.ndarray, ndim: int, axis: int, block_size: int) -> np.ndarray:
    """Scales or zero points in a shape that a weight of `ndim` axes can be divided by."""
    import numpy as np

    if block_size:
        return np.repeat(values, block_size, axis)
    if values.size == 1:
        return values.reshape(())
    return values.reshape([-1 if i == axis % ndim else 1 for i in range(ndim)])


def _quantization(quantize: ir.Node) -> tuple[ir.TensorProtocol, ir.TensorProtocol, ir.TensorProtocol, int, int]:
    """Of a constant's QuantizeLinear: the constant, scales, zero points, axis and block size."""
    tensors = [value.const_value for value in quantize.inputs[:3] if value is not None]
    weight, steps, zeros = tensors
    assert weight is not None
    assert steps is not None
    assert zeros is not None
    told = {name: quantize.attributes[name].as_int() for name in ("axis", "block_size") if name in quantize.attributes}
    return weight, steps, zeros, told.get("axis", 1), told.get("block_size", 0)


def _integers(quantize: ir.Node) -> ir.Value:
    import onnx_ir as ir

    weight, steps, zeros, axis, block_size = _quantization(quantize)

    def make() -> ir.Tensor:
        return ir.Tensor(quantized(weight.numpy(), steps.numpy(), zeros.numpy(), axis, block_size), name=name)

    name = f"{weight.name}_quantized"
    lazy = ir.LazyTensor(make, dtype=zeros.dtype, shape=ir.Shape(weight.shape.numpy()), name=name)
    return ir.Value(name=name, type=ir.TensorType(zeros.dtype), shape=ir.Shape(weight.shape.numpy()), const_value=lazy)


def check(model: ir.Model, *, symmetric: bool) -> dict[str, int]:
    """Counts of what is quantized: {"operators", "activations", "weights", "bits4"}; of `weights`, `bits4` have 4 bits.

    Raises StageError for a graph called quantized in which nothing is, and, where `symmetric` integers were
    asked for (TensorRT takes no other), for unsigned types and zero points that are not zero.
    """
    graph = model.graph
    dequantize = [node for node in graph if node.op_type == "DequantizeLinear"]
    integer = sum(node.op_type == "MatMulInteger" for node in graph)
    if not dequantize and not integer:
        raise StageError(
            "nothing in this graph is quantized: it has no DequantizeLinear",
            "take patterns out of `quantize: {ignore: [...]}`, lower the budget, or build it in another precision",
        )
    for node in dequantize if symmetric else ():
        zero_point = node.inputs[2].const_value if len(node.inputs) > 2 and node.inputs[2] is not None else None
        if zero_point is None:
            continue
        if zero_point.dtype.name not in ("INT8", "INT4") or zero_point.numpy().any():
            raise StageError(
                f"symmetric int8 was asked for, but {node.name} has zero points of {zero_point.dtype.name} "
                f"up to {abs(zero_point.numpy().astype(int)).max()}",
                "use `quantize: {model_type: transformer}`, which NNCF quantizes symmetrically",
            )
    weights = [node.inputs[0] for node in dequantize if node.inputs[0] is not None and node.inputs[0].is_initializer()]
    bits4 = sum(value.dtype is not None and value.dtype.name in ("INT4", "UINT4") for value in weights)
    operators = sum(map(_is_quantized, targets(graph))) + integer
    return {
        "operators": operators, "activations": len(dequantize) - len(weights) + integer,
        "weights": len(weights) + integer, "bits4": bits4,
    }  # fmt: skip


def _is_quantized(node: ir.Node) -> bool:
    """Are its weights integers, or, where it multiplies two activations, both of these?

    A layer that was left in float may read an activation that was quantized for another one.
    """
    import onnx_ir as ir

    given = [_origin(value) for value in node.inputs[:2] if value is not None]
    integers = [not isinstance(of, ir.Value) and of.op_type == "DequantizeLinear" for of in given]
    return integers[1] if _is_constant(given[1]) else all(integers)


def _origin(value: ir.Value) -> ir.Node | ir.Value:
    """The node that computes `value`, or the constant or input that it is, behind moves of data."""
    producer = value.producer()
    while producer is not None and producer.op_type in _MOVES and producer.inputs[0] is not None:
        value = producer.inputs[0]
        producer = value.producer()
    return value if producer is None else producer


def _is_constant(of: ir.Node | ir.Value) -> bool:
    import onnx_ir as ir

    if isinstance(of, ir.Value):
        return of.is_initializer()
    return of.op_type == "DequantizeLinear" and of.inputs[0] is not None and of.inputs[0].is_initializer()


def load(path: Path) -> ir.Model:
    """A model whose large weights stay mapped in their file."""
    import onnx_ir as ir

    return ir.load(path)
