"""ONNX fp32 -> fp16 or bf16: weights and arithmetic in half, the graph's own inputs and outputs in float32.

Casts are placed by type: every operator input gets the half type where the operator's ONNX schema
allows it and float32 where it does not. Whatever a sine or cosine is computed from stays float32, as a
timestep of 999 has no fractional bits left in fp16. Weights are read, cast and written one by
one, so that a 3.4 GB model needs no more memory than its largest tensor.

onnxruntime's and onnxconverter-common's float16 do the same on loaded models only: they hold
weights and their halves in one protobuf (whose limit is 2 GB) and leave sinusoids in fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sdcompile.errors import StageError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

LIMIT = 65504.0
"""The largest fp16."""

_SMALLEST = 2.0**-24

MASK = 1e30
"""Finite values from here on stand for infinity in attention masks; they become the largest fp16."""

KEPT = "kept"
"""Key of a node's metadata_props under which stands why it was left in float32 (read by `backends.trt.graph`)."""

_PERIODIC = {"Sin", "Cos"}

_TYPED_BY_ATTRIBUTE = {
    "Bernoulli", "EyeLike", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
    "SequenceEmpty",
}  # fmt: skip
"""Operators whose output type is an attribute (and `Cast`, which is retyped): they stay float32."""

_CONTRIB = {("com.microsoft", "MultiHeadAttention")}
"""Operators without an ONNX schema whose float inputs and outputs may all be fp16."""


class Half(NamedTuple):
    """A type of half the size of float32: its name in onnx_ir, and how float32 weights become it (weights, name)."""

    name: str
    of: Callable[[np.ndarray, str], np.ndarray]

    @property
    def word(self) -> str:
        """As values and schemas are named after it: "float16"."""
        return self.name.lower()


def prepare(model: ir.Model) -> None:
    """Bring `model` into the form that `cast` takes: no functions, every constant an initializer, every type known.

    Raises StageError for control flow.
    """
    from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass, ShapeInferencePass

    InlinePass()(model)
    if any(value.dtype is None for node in model.graph for value in node.outputs if value.uses()):
        # NNCF does not say of what type the values are that it puts in.
        ShapeInferencePass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    nodes = list(model.graph)
    if any(attribute.type.name in ("GRAPH", "GRAPHS") for node in nodes for attribute in node.attributes.values()):
        raise StageError("the ONNX graph has control flow (If, Loop or Scan), which casting does not take")


def cast(model: ir.Model, half: Half, keep: Mapping[str, str]) -> None:
    """Retype the prepared `model` in place; weights become lazy tensors that are cast when they are written.

    keep: names of nodes that stay float32, and why: written to their metadata, for whoever judges an engine.
    """
    nodes = list(model.graph)
    for node in nodes:
        if str(node.name) in keep:
            node.metadata_props[KEPT] = keep[str(node.name)]
    halves = _Halves(model, nodes, half, keep)
    for node in nodes:
        halves.retype(node)
    halves.restore_outputs()
    halves.cast_weights()


class _Halves:
    """Which values of one graph are float32 now (`floats`), which of them become `half`, and the casts between."""

    def __init__(self, model: ir.Model, nodes: list[ir.Node], half: Half, keep: Mapping[str, str]) -> None:
        import onnx_ir as ir

        self._type, self._as_half, self._word = ir.DataType[half.name], half.of, half.word
        self._graph = model.graph
        self._opsets = model.opset_imports
        self._floats: set[ir.Value] = set()
        for value in (
            *model.graph.inputs,
            *model.graph.initializers.values(),
            *(output for node in nodes for output in node.outputs),
        ):
            if value.dtype is None and value.uses():
                raise StageError(f"the ONNX graph does not say of what type {value.name} is, which casting must know")
            if value.dtype == ir.DataType.FLOAT:
                self._floats.add(value)
        self._kept = _behind_periodic(nodes, self._floats) | {node for node in nodes if str(node.name) in keep}
        self._half: set[ir.Value] = set()
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def retype(self, node: ir.Node) -> None:
        """Give `node` the inputs its schema allows in half as half, and mark its outputs."""
        import onnx_ir as ir

        takes, gives = self._allowed(node)
        for index, value in enumerate(node.inputs):
            if value is None or value not in self._floats:
                continue
            wanted = self._type if takes[index] else ir.DataType.FLOAT
            node.replace_input_with(index, self._as(value, wanted, node, index))
        for index, value in enumerate(node.outputs):
            if value in self._floats and gives[index]:
                self._half.add(value)
                value.dtype = self._type
                _retype_attributes(node, self._type)

    def restore_outputs(self) -> None:
        """Cast half graph outputs back to float32 under their own names."""
        import onnx_ir as ir

        for index, value in enumerate(self._graph.outputs):
            if value not in self._half:
                continue
            name, producer = value.name, value.producer()
            assert producer is not None
            value.name = f"{name}_{self._word}"
            cast = _cast_node(value, ir.DataType.FLOAT, producer, f"{producer.name}/out_to_float32")
            cast.outputs[0].name = name
            self._graph.append(cast)
            self._graph.outputs[index] = cast.outputs[0]

    def cast_weights(self) -> None:
        """Replace the tensor of every initializer that became half by one that casts when it is read."""
        for value in self._graph.initializers.values():
            if value in self._half:
                assert value.const_value is not None
                value.const_value = self._lazily_cast(value.const_value, str(value.name))
                value.dtype = self._type

    def _lazily_cast(self, tensor: ir.TensorProtocol, name: str) -> ir.LazyTensor:
        import onnx_ir as ir

        return ir.LazyTensor(
            lambda: ir.Tensor(self._as_half(tensor.numpy(), name), dtype=self._type, name=name),
            dtype=self._type, shape=ir.Shape(tensor.shape.numpy()), name=name, cache=False,
        )  # fmt: skip

    def _as(self, value: ir.Value, wanted: ir.DataType, node: ir.Node, index: int) -> ir.Value:
        """`value` in the type `wanted`: itself, a weight retyped or copied, or a cast placed before `node`."""
        import onnx_ir as ir

        if value.is_initializer() and (value, wanted) not in self._casts:
            self._casts[value, wanted] = self._weight(value, wanted)
        have = self._type if value in self._half else ir.DataType.FLOAT
        if have == wanted and not value.is_initializer():
            return value
        if (value, wanted) not in self._casts:
            kind = self._word if wanted == self._type else "float32"
            cast = _cast_node(value, wanted, node, f"{node.name}/in{index}_to_{kind}")
            cast.outputs[0].name = f"{value.name}_{kind}"
            self._graph.insert_before(node, cast)
            self._casts[value, wanted] = cast.outputs[0]
        return self._casts[value, wanted]

    def _weight(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """The weight in half under its own name; in float32 as itself, or as a copy beside its half."""
        import onnx_ir as ir

        if wanted == self._type:
            if (value, ir.DataType.FLOAT) not in self._casts:
                self._half.add(value)
                return value
            name = f"{value.name}_{self._word}"
        elif value not in self._half:
            return value
        else:
            name = f"{value.name}_float32"
        kind = ir.TensorType(ir.DataType.FLOAT)
        copy = ir.Value(name=name, type=kind, shape=value.shape, const_value=value.const_value)
        self._graph.register_initializer(copy)
        if wanted == self._type:
            self._half.add(copy)
        return copy

    def _allowed(self, node: ir.Node) -> tuple[list[bool], list[bool]]:
        """Per input and per output of `node`: may it be half?"""
        import onnx

        word = f"tensor({self._word})"
        inputs, outputs = len(node.inputs), len(node.outputs)
        if node in self._kept or node.op_type in _TYPED_BY_ATTRIBUTE:
            return [False] * inputs, [False] * outputs
        if (node.domain, node.op_type) in _CONTRIB:
            return [True] * inputs, [True] * outputs
        if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
            return [False] * inputs, [False] * outputs
        schema = onnx.defs.get_schema(node.op_type, self._opsets[""], "")
        # The last formal parameter of a variadic operator stands for all that follow.
        takes = [schema.inputs[min(i, len(schema.inputs) - 1)] for i in range(inputs)]
        gives = [schema.outputs[min(i, len(schema.outputs) - 1)] for i in range(outputs)]
        return [word in p.types for p in takes], [word in p.types for p in gives]


def _behind_periodic(nodes: list[ir.Node], floats: set[ir.Value]) -> set[ir.Node]:
    """Sines, cosines and every node whose float output one of them is computed from."""
    found: set[ir.Node] = set()
    todo = [node for node in nodes if node.op_type in _PERIODIC]
    while todo:
        node = todo.pop()
        if node in found:
            continue
        found.add(node)
        producers = (value.producer() for value in node.inputs if value is not None and value in floats)
        todo.extend(producer for producer in producers if producer is not None)
    return found


def _cast_node(value: ir.Value, to: ir.DataType, beside: ir.Node, name: str) -> ir.Node:
    import onnx_ir as ir

    cast = ir.node("Cast", [value], attributes={"to": int(to)}, name=name)
    cast.metadata_props.update({key: text for key, text in beside.metadata_props.items() if key != KEPT})
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(to), value.shape
    return cast


def _retype_attributes(node: ir.Node, to: ir.DataType) -> None:
    """Where an attribute says the output's type (Cast's `to`, ConstantOfShape's `value`), make it `to`."""
    import onnx_ir as ir

    if node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", int(to))
    elif node.op_type == "ConstantOfShape":
        value = node.attributes.get("value")
        fill = 0.0 if value is None else float(value.as_tensor().numpy().item())
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor([fill], dtype=to))


def map_weights(model: ir.Model, folder: Path) -> None:
    """Let every external weight be mapped anew each time it is read.

    onnx_ir keeps what it has mapped until the model goes, and (1.1) refuses files with more than
    one hard link, which is how the store and its engines share weights.
    """
    import numpy as np
    import onnx_ir as ir

    def reader(tensor: ir.ExternalTensor) -> ir.LazyTensor:
        path, kind = folder / tensor.location, tensor.dtype.numpy().newbyteorder("<")
        shape, offset = tuple(tensor.shape.numpy()), tensor.offset or 0

        def read() -> ir.Tensor:
            return ir.Tensor(np.memmap(path, dtype=kind, mode="r", offset=offset, shape=shape), name=tensor.name)

        return ir.LazyTensor(read, dtype=tensor.dtype, shape=tensor.shape, name=tensor.name, cache=False)

    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = reader(value.const_value)


def half_of(weights: np.ndarray, name: str) -> np.ndarray:
    """float32 -> float16, rounding to nearest.

    Mask values (beyond 1e30) become the largest fp16 and a scalar that would round to zero the
    smallest, as it may be a divisor. Raises StageError naming the tensor when any other value does
    not fit.
    """
    import numpy as np

    for chunk in _chunks(weights):
        # Infinities are meant (masks); nan compares false and is caught by the second test.
        unfit = (np.abs(chunk) > LIMIT) & (np.abs(chunk) < MASK) | np.isnan(chunk)
        if unfit.any():
            raise StageError(
                f"{name} holds {chunk[unfit][0]:g}, which does not fit fp16 (largest value {LIMIT:g})",
                "set `precision: bf16` or `fp32` for this component",
            )
    half = np.where(np.isinf(weights), weights, np.clip(weights, -LIMIT, LIMIT)).astype(np.float16)
    if weights.size == 1 and weights.item() != 0 and half.item() == 0:
        half[...] = np.copysign(_SMALLEST, weights)
    return half


def brain_of(weights: np.ndarray, name: str) -> np.ndarray:
    """float32 -> bfloat16, rounding to nearest. Raises StageError where a value is NaN.

    The range is float32's but for its last step: what would round to infinity becomes the largest bfloat16, as
    a mask of infinities makes a softmax of nothing but them NaN.
    """
    import ml_dtypes
    import numpy as np

    for chunk in _chunks(weights):
        if np.isnan(chunk).any():
            raise StageError(f"{name} holds nan", "check the source's weights with diffusers")
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    return np.where(np.isinf(weights), weights, np.clip(weights, -largest, largest)).astype(ml_dtypes.bfloat16)


def _chunks(weights: np.ndarray) -> Iterator[np.ndarray]:
    flat = weights.reshape(-1)
    size = 1 << 22
    for start in range(0, flat.size, size):
        yield flat[start : start + size]


FP16 = Half("FLOAT16", half_of)
BF16 = Half("BFLOAT16", brain_of)
