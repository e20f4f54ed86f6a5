"""Quantized activations of ONNX in OpenVINO's own form, which every CPU has int8 kernels for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdcompile.backends import openvino_graphs as graphs
from sdcompile.backends import openvino_ir

pytestmark = pytest.mark.tiny
ov = pytest.importorskip("openvino")
WIDTH = 32


def graph(folder: Path, zero_point: int, kind: type, scale: float = 0.03) -> Path:
    """A convolution and a linear layer that read one quantized tensor; weights per channel."""
    import onnx
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    tensors = {
        "scale": np.float32(scale), "zero": np.array(zero_point, kind),
        "conv_w": rng.integers(-127, 128, (WIDTH, WIDTH, 3, 3)).astype(np.int8),
        "line_w": rng.integers(-127, 128, (WIDTH, WIDTH)).astype(np.int8),
        "step": (0.001 + 0.002 * rng.random(WIDTH)).astype(np.float32), "none": np.zeros(WIDTH, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["gate"]),
        helper.make_node("Mul", ["x", "gate"], ["silu"]),
        helper.make_node("QuantizeLinear", ["silu", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["conv_w", "step", "none"], ["conv_f"], axis=0),
        helper.make_node("DequantizeLinear", ["line_w", "step", "none"], ["line_f"], axis=1),
        helper.make_node("Conv", ["dq", "conv_f"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["dq", "line_f"], ["line"]),
        helper.make_node("Add", ["conv", "line"], ["y"]),
    ]
    value = lambda name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, WIDTH, WIDTH, WIDTH])  # noqa: E731
    inits = [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()]
    made = helper.make_graph(nodes, "g", [value("x")], [value("y")], inits)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def converted(source: Path, out: Path):
    out.mkdir(exist_ok=True)
    openvino_ir.convert(ov.Core(), source, out, "fp32", "auto")
    return ov.Core().compile_model(out / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


@pytest.mark.parametrize(("zero_point", "kind"), [(-100, np.int8), (0, np.int8), (28, np.uint8)])
def test_both_layers_run_in_int8_and_compute_what_onnx_says(tmp_path, zero_point, kind):
    import onnxruntime

    source = graph(tmp_path, zero_point, kind)
    compiled = converted(source, tmp_path / "ir")
    assert graphs.integer_operators(compiled)["int8"] == 2
    x = 2 * np.random.default_rng(1).standard_normal((1, WIDTH, WIDTH, WIDTH), np.float32)
    wanted = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    assert np.abs(compiled(x)[0] - wanted).max() < 2e-3 * np.abs(wanted).max()
    other = converted(graph(tmp_path, zero_point, kind, scale=0.033), tmp_path / "other")
    assert np.abs(other(x)[0] - wanted).max() > 2e-3 * np.abs(wanted).max(), "the sibling: another scale"


def test_a_pair_becomes_one_node_and_weights_stay_integers(tmp_path):
    model = ov.Core().read_model(graph(tmp_path, -100, np.int8))
    assert openvino_ir.fuse_quantization(model) == 1
    assert openvino_ir.fuse_quantization(model) == 0, "there is nothing left to do"
    kinds = [
        (node.get_type_name(), node.get_output_element_type(0).to_string()) for node in model.get_ordered_ops()[:-1]
    ]
    assert kinds.count(("Constant", "i8")) >= 2
    assert ("Convert", "i8") not in kinds
