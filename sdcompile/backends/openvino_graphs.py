"""What an OpenVINO graph holds: weights that fit fp16, operators that run in int8, what each took. It runs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import openvino as ov

_FP16_MAX = 65504.0
_FP16_SMALLEST_NORMAL = 2.0**-14

_MASK = 1e30
"""Finite values beyond this stand for infinity in attention masks; they are no weights."""

_CHUNK = 1 << 24

_PRODUCTS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
"""Layers of a compiled model that int8 makes faster."""


def fits_fp16(model: ov.Model) -> bool:
    """False when a weight tensor overflows fp16 or lies wholly among its subnormals."""
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type().get_type_name() != "f32":
            continue
        data = node.data.reshape(-1)
        if data.size < 2:
            continue
        largest = max(_largest(data[i : i + _CHUNK]) for i in range(0, data.size, _CHUNK))
        if _FP16_MAX < largest < _MASK or 0 < largest < _FP16_SMALLEST_NORMAL:
            return False
    return True


def _largest(chunk: np.ndarray) -> float:
    return max(float(chunk.max()), -float(chunk.min()))


def has_quantized_activations(model: ov.Model) -> bool:
    return any(op.get_type_name() == "FakeQuantize" for op in model.get_ops())


def integer_operators(compiled: ov.CompiledModel) -> dict[str, int]:
    """How many of the compiled model's convolutions and products take integers of 8 and of 4 bits.

    Of a model whose activations are quantized they run on them; else they read such weights.
    """
    found = {"int8": 0, "int4": 0}
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        kind, precision = (str(info[key].value) if key in info else "" for key in ("layerType", "runtimePrecision"))
        if kind in _PRODUCTS and precision[1:] in ("8", "4"):
            found[f"int{precision[1:]}"] += 1
    return found


def counted(request: ov.InferRequest) -> list[tuple[str, float]]:
    """Of the last call of a model compiled with PERF_COUNT: per kernel, in order, the names of the operators that it
    computes (its own where it stands for none, as a reorder does) and the seconds it took."""
    graph = request.get_compiled_model().get_runtime_model()
    names = {op.get_friendly_name(): str(op.get_rt_info()["originalLayersNames"].value) for op in graph.get_ops()}
    return [
        (names.get(row.node_name) or row.node_name, row.real_time.total_seconds()) for row in request.profiling_info
    ]
