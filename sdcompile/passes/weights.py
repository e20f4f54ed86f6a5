"""Quantized weights in an ONNX graph, written here and not by NNCF: per channel in 8 bits, in groups in 4 bits, and
8-bit products whose activations are quantized at run time.

NNCF's compress_weights writes scales for convolutions that ONNX Runtime refuses, and no 4-bit ONNX below opset 21
(NNCF 3.4). What stands here is ONNX that both engines turn into their own kernels: DequantizeLinear on constants
(MatMulNBits in ONNX Runtime, compressed FullyConnected in OpenVINO), and MatMulInteger.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdcompile.errors import StageError
from sdcompile.passes import casting, qdq

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

BLOCKED_OPSET = 21
"""The first ONNX opset with 4-bit integers and one scale for each block of a weight."""


def insert_pairs(source: Path, target: Path, ignored: Collection[str], group_size: int | None, symmetric: bool) -> None:
    """Put a pair on the weight of every convolution and product of the graph `source`; write it to `target`.

    8 bits: symmetric, one scale per output channel. With a `group_size` linear layers whose inputs it divides get
    4 bits, one scale (and, unless `symmetric`, one zero point) for each group of inputs of each output.
    Raises StageError when it divides those of none.
    """
    import onnx_ir as ir

    model = qdq.load(source)
    casting.map_weights(model, source.parent)
    found = 0
    for node, weight, values in _weighted(model, ignored):
        transposed = _is_transposed(node)
        inputs = values.ndim - 1 if transposed else values.ndim - 2
        linear = node.op_type in ("MatMul", "Gemm") and values.ndim == 2
        if group_size is not None and linear and values.shape[inputs] % group_size == 0:
            scale, zero_point = grouped(values, inputs, group_size, symmetric=symmetric)
            attributes = [ir.AttrInt64("axis", inputs), ir.AttrInt64("block_size", group_size)]
            found += 1
        else:
            axis = _output_axis(node, values.ndim)
            scale, zero_point = per_channel(values, axis)
            attributes = [ir.AttrInt64("axis", axis)]
        _insert_pair(model.graph, node, weight, scale, zero_point, attributes)
    if group_size is not None:
        if not found:
            raise StageError(
                f"no linear layer has a number of inputs that groups of {group_size} divide, so none can have 4 bits",
                "lower `quantize: {group_size: ...}`, ignore fewer modules, or leave out `bits: 4`",
            )
        _raise_opset(model)
    ir.save(model, target, external_data="model.onnx.data")


def quantize_at_run_time(source: Path, target: Path, ignored: Collection[str]) -> int:
    """Write the graph `source` to `target` with linear layers computed on integers; returns how many there are.

    A layer's input gets one scale and zero point for each call (DynamicQuantizeLinear), its weight one scale per
    output. Convolutions stay in float: ONNX Runtime's ConvInteger took three times as long on the tiny model.
    """
    import onnx_ir as ir

    model = qdq.load(source)
    casting.map_weights(model, source.parent)
    read: dict[ir.Value, Sequence[ir.Value]] = {}
    linear = [
        (node, weight, values)
        for node, weight, values in _weighted(model, ignored)
        if node.op_type in ("MatMul", "Gemm") and values.ndim == 2 and _is_plain(node)
    ]
    if not linear:
        raise StageError(
            "nothing in this graph is quantized: it has no linear layer left to quantize at run time",
            "take patterns out of `quantize: {ignore: [...]}`, or build it in another precision",
        )
    for node, weight, values in linear:
        given = node.inputs[0]
        assert given is not None
        if given not in read:
            read[given] = _quantized_input(model.graph, node, given)
        result = _integer_product(model.graph, node, read[given], values.T if _is_transposed(node) else values)
        _take_the_place(model.graph, node, result)
        if not weight.uses():
            del model.graph.initializers[str(weight.name)]
    ir.save(model, target, external_data="model.onnx.data")
    return len(linear)


def _quantized_input(graph: ir.Graph, node: ir.Node, given: ir.Value) -> Sequence[ir.Value]:
    """`given` in uint8, its scale and its zero point, all computed in front of `node`."""
    import onnx_ir as ir

    quantize = ir.Node("", "DynamicQuantizeLinear", [given], name=f"{node.name}/input", num_outputs=3)
    for value, suffix in zip(quantize.outputs, ("quantized", "scale", "zero_point"), strict=True):
        value.name = f"{node.name}/input_{suffix}"
    graph.insert_before(node, quantize)
    return quantize.outputs


def _integer_product(graph: ir.Graph, node: ir.Node, x: Sequence[ir.Value], matrix: np.ndarray) -> ir.Value:
    """What `node` gives, in float, computed on integers: those of `_quantized_input` and of its weight (K, N)."""
    import numpy as np
    import onnx_ir as ir

    scale, zero_point = per_channel(matrix, 1)
    integers = qdq.quantized(matrix, scale, zero_point, 1)
    weight, weight_scale, weight_zero = (
        _constant(f"{node.name}/{name}", array)
        for name, array in (("weight", integers), ("scale", scale), ("zero_point", np.zeros((), np.int8)))
    )
    for constant in (weight, weight_scale, weight_zero):
        graph.initializers[str(constant.name)] = constant
    sums = _node(graph, node, "MatMulInteger", [x[0], weight, x[2], weight_zero])
    sums = _node(graph, node, "Cast", [sums], [ir.AttrInt64("to", ir.DataType.FLOAT.value)])
    scales = _node(graph, node, "Mul", [x[1], weight_scale])
    result = _node(graph, node, "Mul", [sums, scales], suffix="Rescale")
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    return result if bias is None else _node(graph, node, "Add", [result, bias])


def _take_the_place(graph: ir.Graph, node: ir.Node, result: ir.Value) -> None:
    """Have all that `node` fed, and the graph's outputs, be fed by `result`; remove `node`."""
    output = node.outputs[0]
    name, result.shape, result.type = output.name, output.shape, output.type
    for use in list(output.uses()):
        use.node.replace_input_with(use.idx, result)
    for index, value in enumerate(graph.outputs):
        if value is output:
            graph.outputs[index] = result
    graph.remove(node, safe=True)
    result.name = name


def per_channel(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(scale float32, zero points 0 int8) of symmetric 8 bits, along `axis`."""
    import numpy as np

    largest = np.abs(values).max(axis=tuple(i for i in range(values.ndim) if i != axis))
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return scale, np.zeros(scale.shape, np.int8)


def grouped(values: np.ndarray, axis: int, size: int, *, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """(scale float32, zero point 4-bit) of each group of `size` along `axis` of a matrix.

    Symmetric: integers -8 to 7 (int4), the value of largest magnitude at -8, so that no level is wasted.
    Else 0 to 15 (uint4) from the group's least value to its greatest, with 0 exactly representable.
    """
    import ml_dtypes
    import numpy as np

    groups = np.moveaxis(values, axis, 0).reshape(-1, size, values.shape[1 - axis])
    if symmetric:
        at = np.abs(groups).argmax(1, keepdims=True)
        largest = np.take_along_axis(groups, at, 1)[:, 0]
        scale = np.where(largest != 0, largest / -8, 1)
        zero_point = np.zeros(scale.shape)
    else:
        low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
        scale = np.where(high > low, (high - low) / 15, 1)
        zero_point = np.clip(np.rint(-low / scale), 0, 15)
    kind = ml_dtypes.int4 if symmetric else ml_dtypes.uint4
    # Back to the weight's own order of axes: groups where its inputs are.
    return np.moveaxis(scale, 0, axis).astype(np.float32), np.moveaxis(zero_point, 0, axis).astype(kind)


def _weighted(model: ir.Model, ignored: Collection[str]) -> Sequence[tuple[ir.Node, ir.Value, np.ndarray]]:
    """Convolutions and products with a constant weight that are not ignored, with its values."""
    found = []
    for node in qdq.targets(model.graph):
        weight = node.inputs[1]
        if weight is not None and weight.is_initializer() and node.name not in ignored:
            assert weight.const_value is not None
            found.append((node, weight, weight.const_value.numpy()))
    return found


def _is_transposed(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and "transB" in node.attributes and bool(node.attributes["transB"].as_int())


def _is_plain(node: ir.Node) -> bool:
    """Is a Gemm x W + b, with nothing scaled and x as it is?"""
    found = {name: attribute.value for name, attribute in node.attributes.items()}
    return not found.get("transA") and found.get("alpha", 1.0) == 1.0 and found.get("beta", 1.0) == 1.0


def _output_axis(node: ir.Node, dims: int) -> int:
    if node.op_type == "Conv" or _is_transposed(node):
        return 0
    return 1 if node.op_type == "ConvTranspose" else dims - 1


def _insert_pair(
    graph: ir.Graph, node: ir.Node, weight: ir.Value, scale: np.ndarray, zero_point: np.ndarray,
    attributes: Sequence[ir.Attr],
) -> None:  # fmt: skip
    import onnx_ir as ir

    constants = [_constant(f"{weight.name}_scale", scale), _constant(f"{weight.name}_zero_point", zero_point)]
    value: ir.Value = weight
    for op in ("QuantizeLinear", "DequantizeLinear"):
        pair = ir.Node("", op, [value, *constants], attributes, name=f"{node.name}/weight/{op}", num_outputs=1)
        graph.insert_before(node, pair)
        value = pair.outputs[0]
        value.name = f"{node.name}/weight/{op}"
    for constant in constants:
        graph.initializers.setdefault(str(constant.name), constant)
    node.replace_input_with(1, value)


def _node(
    graph: ir.Graph, before: ir.Node, op: str, inputs: Sequence[ir.Value], attributes: Sequence[ir.Attr] = (),
    suffix: str = "",
) -> ir.Value:  # fmt: skip
    """A node of one output in front of `before`, of the same module; returns the output."""
    import onnx_ir as ir

    made = ir.Node("", op, inputs, attributes, name=f"{before.name}/{suffix or op}", num_outputs=1)
    made.metadata_props.update(before.metadata_props)
    graph.insert_before(before, made)
    made.outputs[0].name = f"{before.name}/{suffix or op}"
    return made.outputs[0]


def _constant(name: str, array: np.ndarray) -> ir.Value:
    import onnx_ir as ir

    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))


def _raise_opset(model: ir.Model) -> None:
    """Read the graph as one of `BLOCKED_OPSET`: of the operators that exporters of SD models write, opset 21 gives
    some further types and only GroupNormalization another meaning."""
    if any(node.op_type == "GroupNormalization" for node in model.graph):
        raise StageError("the graph has GroupNormalization, which 4 bits would give another meaning")
    model.opset_imports[""] = max(BLOCKED_OPSET, model.opset_imports[""])
