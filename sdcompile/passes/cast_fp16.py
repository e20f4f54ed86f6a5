"""ONNX fp32 -> fp16: weights and arithmetic in half, the graph's own inputs and outputs in float32.

Casts are placed by type: every operator input gets fp16 where the operator's ONNX schema allows
it and float32 where it does not. Whatever a sine or cosine is computed from stays float32, as a
timestep of 999 has no fractional bits left in fp16. Weights are read, cast and written one by
one, so that a 3.4 GB model needs no more memory than its largest tensor.

onnxruntime's and onnxconverter-common's float16 do the same on loaded models only: they hold
weights and their halves in one protobuf (whose limit is 2 GB) and leave sinusoids in fp16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from sdcompile.errors import StageError
from sdcompile.passes.base import Pass
from sdcompile.spec import Job

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

REVISION = 1

_MAX = 65504.0
_SMALLEST = 2.0**-24

_MASK = 1e30
"""Finite values from here on stand for infinity in attention masks; they become the largest fp16."""

_PERIODIC = {"Sin", "Cos"}

_TYPED_BY_ATTRIBUTE = {
    "Bernoulli", "EyeLike", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
    "SequenceEmpty",
}  # fmt: skip
"""Operators whose output type is an attribute (and `Cast`, which is retyped): they stay float32."""

_CONTRIB = {("com.microsoft", "MultiHeadAttention")}
"""Operators without an ONNX schema whose float inputs and outputs may all be fp16."""


class Params(BaseModel):
    """The pass has no parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Write the fp16 form of `inputs["onnx"]/model.onnx` to `out/model.onnx` (+ model.onnx.data).

    Raises StageError naming the tensor when a weight does not fit fp16 (largest value 65504).
    """
    import onnx
    import onnx_ir as ir

    job.say("casting to fp16", None)
    model = ir.load(inputs["onnx"] / "model.onnx")
    _map_weights(model, inputs["onnx"])
    cast_to_half(model)
    job.say("writing model.onnx", None)
    ir.save(model, out / "model.onnx", external_data="model.onnx.data")
    onnx.checker.check_model(out / "model.onnx")


def cast_to_half(model: ir.Model) -> None:
    """Retype `model` in place; weights become lazy tensors that are cast when they are written."""
    from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass, ShapeInferencePass

    InlinePass()(model)
    if any(value.dtype is None for node in model.graph for value in node.outputs if value.uses()):
        # NNCF does not say of what type the values are that it puts in.
        ShapeInferencePass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    graph = model.graph
    nodes = list(graph)
    if any(attribute.type.name in ("GRAPH", "GRAPHS") for node in nodes for attribute in node.attributes.values()):
        raise StageError("the ONNX graph has control flow (If, Loop or Scan), which cast_fp16 does not take")
    halves = _Halves(model, nodes)
    for node in nodes:
        halves.retype(node)
    halves.restore_outputs()
    halves.cast_weights()


class _Halves:
    """Which values of one graph are float32 now (`floats`), which of them become fp16, and the casts between."""

    def __init__(self, model: ir.Model, nodes: list[ir.Node]) -> None:
        import onnx_ir as ir

        self._graph = model.graph
        self._opsets = model.opset_imports
        self._floats: set[ir.Value] = set()
        for value in (
            *model.graph.inputs,
            *model.graph.initializers.values(),
            *(output for node in nodes for output in node.outputs),
        ):
            if value.dtype is None and value.uses():
                raise StageError(f"the ONNX graph does not say of what type {value.name} is, which cast_fp16 must know")
            if value.dtype == ir.DataType.FLOAT:
                self._floats.add(value)
        self._kept = _behind_periodic(nodes, self._floats)
        self._half: set[ir.Value] = set()
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def retype(self, node: ir.Node) -> None:
        """Give `node` the inputs its schema allows in fp16 as fp16, and mark its outputs."""
        import onnx_ir as ir

        takes, gives = self._allowed(node)
        for index, value in enumerate(node.inputs):
            if value is None or value not in self._floats:
                continue
            wanted = ir.DataType.FLOAT16 if takes[index] else ir.DataType.FLOAT
            node.replace_input_with(index, self._as(value, wanted, node, index))
        for index, value in enumerate(node.outputs):
            if value in self._floats and gives[index]:
                self._half.add(value)
                value.dtype = ir.DataType.FLOAT16
                _retype_attributes(node)

    def restore_outputs(self) -> None:
        """Cast fp16 graph outputs back to float32 under their own names."""
        import onnx_ir as ir

        for index, value in enumerate(self._graph.outputs):
            if value not in self._half:
                continue
            name, producer = value.name, value.producer()
            assert producer is not None
            value.name = f"{name}_float16"
            cast = _cast_node(value, ir.DataType.FLOAT, producer, f"{producer.name}/out_to_float32")
            cast.outputs[0].name = name
            self._graph.append(cast)
            self._graph.outputs[index] = cast.outputs[0]

    def cast_weights(self) -> None:
        """Replace the tensor of every initializer that became fp16 by one that casts when it is read."""
        import onnx_ir as ir

        for value in self._graph.initializers.values():
            if value in self._half:
                assert value.const_value is not None
                value.const_value = _lazily_cast(value.const_value, str(value.name))
                value.dtype = ir.DataType.FLOAT16

    def _as(self, value: ir.Value, wanted: ir.DataType, node: ir.Node, index: int) -> ir.Value:
        """`value` in the type `wanted`: itself, a weight retyped or copied, or a cast placed before `node`."""
        import onnx_ir as ir

        if value.is_initializer() and (value, wanted) not in self._casts:
            self._casts[value, wanted] = self._weight(value, wanted)
        have = ir.DataType.FLOAT16 if value in self._half else ir.DataType.FLOAT
        if have == wanted and not value.is_initializer():
            return value
        if (value, wanted) not in self._casts:
            kind = "float16" if wanted == ir.DataType.FLOAT16 else "float32"
            cast = _cast_node(value, wanted, node, f"{node.name}/in{index}_to_{kind}")
            cast.outputs[0].name = f"{value.name}_{kind}"
            self._graph.insert_before(node, cast)
            self._casts[value, wanted] = cast.outputs[0]
        return self._casts[value, wanted]

    def _weight(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """The weight in fp16 under its own name; in float32 as itself, or as a copy beside its half."""
        import onnx_ir as ir

        if wanted == ir.DataType.FLOAT16:
            if (value, ir.DataType.FLOAT) not in self._casts:
                self._half.add(value)
                return value
            name = f"{value.name}_float16"
        elif value not in self._half:
            return value
        else:
            name = f"{value.name}_float32"
        kind = ir.TensorType(ir.DataType.FLOAT)
        copy = ir.Value(name=name, type=kind, shape=value.shape, const_value=value.const_value)
        self._graph.register_initializer(copy)
        if wanted == ir.DataType.FLOAT16:
            self._half.add(copy)
        return copy

    def _allowed(self, node: ir.Node) -> tuple[list[bool], list[bool]]:
        """Per input and per output of `node`: may it be fp16?"""
        import onnx

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
        return ["tensor(float16)" in p.types for p in takes], ["tensor(float16)" in p.types for p in gives]


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
    cast.metadata_props.update(beside.metadata_props)
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(to), value.shape
    return cast


def _retype_attributes(node: ir.Node) -> None:
    """Where an attribute says the output's type (Cast's `to`, ConstantOfShape's `value`), make it fp16."""
    import onnx_ir as ir

    if node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT16))
    elif node.op_type == "ConstantOfShape":
        value = node.attributes.get("value")
        fill = 0.0 if value is None else float(value.as_tensor().numpy().item())
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor([fill], dtype=ir.DataType.FLOAT16))


def _lazily_cast(tensor: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    import onnx_ir as ir

    return ir.LazyTensor(
        lambda: ir.Tensor(half_of(tensor.numpy(), name), name=name),
        dtype=ir.DataType.FLOAT16, shape=ir.Shape(tensor.shape.numpy()), name=name, cache=False,
    )  # fmt: skip


def _map_weights(model: ir.Model, folder: Path) -> None:
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
        unfit = (np.abs(chunk) > _MAX) & (np.abs(chunk) < _MASK) | np.isnan(chunk)
        if unfit.any():
            raise StageError(
                f"{name} holds {chunk[unfit][0]:g}, which does not fit fp16 (largest value {_MAX:g})",
                "set `precision: bf16` or `fp32` for this component",
            )
    half = np.where(np.isinf(weights), weights, np.clip(weights, -_MAX, _MAX)).astype(np.float16)
    if weights.size == 1 and weights.item() != 0 and half.item() == 0:
        half[...] = np.copysign(_SMALLEST, weights)
    return half


def _chunks(weights: np.ndarray) -> Iterator[np.ndarray]:
    flat = weights.reshape(-1)
    size = 1 << 22
    for start in range(0, flat.size, size):
        yield flat[start : start + size]


PASS = Pass(
    name="cast_fp16",
    stage="quantize",
    kind="onnx",
    revision=REVISION,
    memory=(0.2, 0.5),
    params=Params,
    run=run,
    packages=("onnx", "onnxscript"),
)
