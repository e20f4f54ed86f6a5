"""cast_fp16: half inside, float32 outside, and no number that fp16 cannot hold."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from sdcompile.errors import StageError
from sdcompile.passes import PASSES
from sdcompile.passes.casting import half_of
from sdcompile.spec import Job

pytestmark = pytest.mark.tiny
onnx = pytest.importorskip("onnx")
FLOAT, HALF, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64


def write(folder: Path, nodes, weights, inputs, outputs, values=(), domains=()) -> Path:
    """A graph of `nodes` at `folder/model.onnx`, its weights in external data as the exporter leaves them."""
    folder.mkdir(exist_ok=True)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "g",
        [info(name, kind, shape) for name, kind, shape in inputs],
        [info(name, kind, shape) for name, kind, shape in outputs],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
        value_info=[info(name, kind, shape) for name, kind, shape in values],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 20), *(onnx.helper.make_opsetid(d, 1) for d in domains)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=256)
    return folder


def cast(source: Path, out: Path):
    out.mkdir(exist_ok=True)
    PASSES["cast_fp16"].run({"onnx": source}, out, Job("unet"))
    onnx.checker.check_model(out / "model.onnx", full_check=True)
    return onnx.load(out / "model.onnx")


def session(folder: Path):
    import onnxruntime as ort

    return ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def linear(folder: Path, weight: np.ndarray) -> Path:
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="unet.proj/MatMul_0")
    node.metadata_props.add(key="module", value="unet.proj")
    width = weight.shape[1]
    return write(folder, [node], {"w": weight}, [("x", FLOAT, ["N", len(weight)])], [("y", FLOAT, ["N", width])])


def sinusoid(folder: Path) -> Path:
    """sin(timestep * frequency) @ w, the start of every diffusion model's time embedding."""
    make = onnx.helper.make_node
    nodes = [
        make("Mul", ["t", "frequencies"], ["angles"], name="time_proj/Mul_0"),
        make("Sin", ["angles"], ["sines"], name="time_proj/Sin_0"),
        make("MatMul", ["sines", "w"], ["y"], name="linear_1/MatMul_0"),
    ]
    frequencies = np.exp(-np.arange(16, dtype=np.float32))[None]
    weights = {"frequencies": frequencies, "w": np.eye(16, dtype=np.float32)}
    values = [("angles", FLOAT, ["N", 16]), ("sines", FLOAT, ["N", 16])]
    return write(folder, nodes, weights, [("t", FLOAT, ["N", 1])], [("y", FLOAT, ["N", 16])], values)


def test_inputs_and_outputs_keep_their_names_and_float32(tmp_path):
    model = cast(linear(tmp_path / "in", np.eye(16, dtype=np.float32)), tmp_path / "out")
    for value, name in ((model.graph.input[0], "x"), (model.graph.output[0], "y")):
        assert (value.name, value.type.tensor_type.elem_type) == (name, FLOAT)


def test_weights_are_halved_on_disk_and_nodes_keep_their_names_and_modules(tmp_path):
    source = linear(tmp_path / "in", np.random.default_rng(0).standard_normal((64, 64), np.float32))
    model = cast(source, tmp_path / "out")
    assert [w.data_type for w in model.graph.initializer] == [HALF]
    before = (source / "model.onnx.data").stat().st_size
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size == before // 2
    for node in model.graph.node:
        assert node.name.startswith("unet.proj/MatMul_0")
        assert {p.key: p.value for p in node.metadata_props} == {"module": "unet.proj"}
    assert len({node.name for node in model.graph.node}) == len(model.graph.node) == 3


def test_the_result_agrees_with_the_fp32_graph_to_fp16s_precision_and_no_better(tmp_path):
    random = np.random.default_rng(0)
    source = linear(tmp_path / "in", random.standard_normal((64, 64), np.float32))
    cast(source, tmp_path / "out")
    feeds = {"x": random.standard_normal((4, 64), np.float32)}
    expected, found = session(source).run(None, feeds)[0], session(tmp_path / "out").run(None, feeds)[0]
    error = np.linalg.norm(expected - found) / np.linalg.norm(expected)
    assert found.dtype == np.float32
    assert 1e-5 < error < 2e-3


def test_sinusoids_of_large_timesteps_stay_exact(tmp_path):
    source = sinusoid(tmp_path / "in")
    model = cast(source, tmp_path / "out")
    feeds = {"t": np.array([[999.0], [998.5], [1.0]], np.float32)}
    expected, found = session(source).run(None, feeds)[0], session(tmp_path / "out").run(None, feeds)[0]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    kinds = {w.name: w.data_type for w in model.graph.initializer}
    assert kinds == {"frequencies": FLOAT, "w": HALF}
    # What would have happened: 998.5 * exp(-1) rounded to fp16 is off by a tenth of a radian.
    angle = np.float32(998.5) * np.exp(np.float32(-1))
    assert abs(np.sin(np.float32(np.float16(angle))) - np.sin(angle)) > 0.01


def test_a_weight_needed_in_both_types_is_kept_in_both(tmp_path):
    make = onnx.helper.make_node
    nodes = [
        make("Mul", ["x", "w"], ["angles"], name="a"),
        make("Cos", ["angles"], ["cosines"], name="b"),
        make("Mul", ["x", "w"], ["scaled"], name="c"),
        make("Add", ["cosines", "scaled"], ["y"], name="d"),
    ]
    values = [(name, FLOAT, ["N", 128]) for name in ("angles", "cosines", "scaled")]
    weights = {"w": np.linspace(0, 900, 128, dtype=np.float32)}
    source = write(tmp_path / "in", nodes, weights, [("x", FLOAT, ["N", 128])], [("y", FLOAT, ["N", 128])], values)
    model = cast(source, tmp_path / "out")
    assert {w.name: w.data_type for w in model.graph.initializer} == {"w": FLOAT, "w_float16": HALF}
    feeds = {"x": np.ones((1, 128), np.float32)}
    expected, found = session(source).run(None, feeds)[0], session(tmp_path / "out").run(None, feeds)[0]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_inputs_a_schema_wants_in_float32_stay_so(tmp_path):
    node = onnx.helper.make_node("Resize", ["x", "", "scales"], ["y"], name="up/Resize_0", mode="nearest")
    scales = {"scales": np.array([1, 1, 2, 2], np.float32)}
    source = write(
        tmp_path / "in", [node], scales, [("x", FLOAT, [1, 1, "h", "w"])], [("y", FLOAT, [1, 1, "2*h", "2*w"])]
    )
    model = cast(source, tmp_path / "out")
    assert [w.data_type for w in model.graph.initializer] == [FLOAT]
    feeds = {"x": np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)}
    np.testing.assert_array_equal(session(source).run(None, feeds)[0], session(tmp_path / "out").run(None, feeds)[0])


def test_casts_and_fills_to_float_become_half(tmp_path):
    make = onnx.helper.make_node
    fill = onnx.helper.make_tensor("value", FLOAT, [1], [2.5])
    nodes = [
        make("Cast", ["ids"], ["floats"], name="a", to=FLOAT),
        make("Shape", ["ids"], ["size"], name="b"),
        make("ConstantOfShape", ["size"], ["filled"], name="c", value=fill),
        make("Add", ["floats", "filled"], ["y"], name="d"),
    ]
    values = [("floats", FLOAT, ["N"]), ("size", INT64, [1]), ("filled", FLOAT, ["N"])]
    source = write(tmp_path / "in", nodes, {}, [("ids", INT64, ["N"])], [("y", FLOAT, ["N"])], values)
    model = cast(source, tmp_path / "out")
    assert [node.op_type for node in model.graph.node] == ["Cast", "Shape", "ConstantOfShape", "Add", "Cast"]
    feeds = {"ids": np.arange(3)}
    np.testing.assert_array_equal(session(tmp_path / "out").run(None, feeds)[0], np.float32([2.5, 3.5, 4.5]))


def test_the_fused_attention_operator_runs_in_half(tmp_path):
    node = onnx.helper.make_node(
        "MultiHeadAttention", ["q", "q", "q"], ["y"], name="attn/MHA_0", domain="com.microsoft", num_heads=2
    )
    shape = ["N", "T", 16]
    source = write(tmp_path / "in", [node], {}, [("q", FLOAT, shape)], [("y", FLOAT, shape)], domains=["com.microsoft"])
    (tmp_path / "out").mkdir()
    PASSES["cast_fp16"].run({"onnx": source}, tmp_path / "out", Job("unet"))
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert [n.op_type for n in model.graph.node] == ["Cast", "MultiHeadAttention", "Cast"]
    feeds = {"q": np.random.default_rng(0).standard_normal((1, 5, 16), np.float32)}
    expected, found = session(source).run(None, feeds)[0], session(tmp_path / "out").run(None, feeds)[0]
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_an_unknown_operator_stays_in_float32(tmp_path):
    make = onnx.helper.make_node
    nodes = [
        make("Identity", ["x"], ["a"], name="a"),
        make("Gelu", ["a"], ["b"], name="b", domain="com.microsoft"),
        make("Identity", ["b"], ["y"], name="c"),
    ]
    values = [("a", FLOAT, [4]), ("b", FLOAT, [4])]
    source = write(
        tmp_path / "in", nodes, {}, [("x", FLOAT, [4])], [("y", FLOAT, [4])], values, domains=["com.microsoft"]
    )
    (tmp_path / "out").mkdir()
    PASSES["cast_fp16"].run({"onnx": source}, tmp_path / "out", Job("unet"))
    feeds = {"x": np.float32([-1, 0, 1, 2])}
    expected, found = session(source).run(None, feeds)[0], session(tmp_path / "out").run(None, feeds)[0]
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("value", [1e6, -65505.0, float("nan")])
def test_a_weight_fp16_cannot_hold_is_refused_by_name(value, tmp_path):
    weight = np.zeros((16, 16), np.float32)
    weight[3, 4] = value
    source = linear(tmp_path / "in", weight)
    with pytest.raises(StageError, match=r"^w holds .* does not fit fp16") as refused:
        cast(source, tmp_path / "out")
    assert "bf16" in refused.value.hint


def test_masks_become_fp16s_own_extremes_and_tiny_divisors_stay_above_zero():
    mask = half_of(np.float32([0, -3.4e38, np.inf, -np.inf, 65504]), "mask")
    np.testing.assert_array_equal(mask, np.float16([0, -65504, np.inf, -np.inf, 65504]))
    assert half_of(np.float32(1e-12), "eps") > 0
    assert half_of(np.float32([1e-12, 1.0]), "weights")[0] == 0


def test_weights_shared_by_hard_links_can_be_read(tmp_path):
    source = linear(tmp_path / "in", np.eye(32, dtype=np.float32))
    os.link(source / "model.onnx.data", tmp_path / "second name")
    cast(source, tmp_path / "out")


def test_control_flow_is_refused(tmp_path):
    info = onnx.helper.make_tensor_value_info("z", FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["z"])
    branch = onnx.helper.make_graph([node], "branch", [], [info])
    both = onnx.helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch, else_branch=branch)
    source = write(
        tmp_path / "in", [both], {}, [("c", onnx.TensorProto.BOOL, []), ("x", FLOAT, [1])], [("y", FLOAT, [1])]
    )
    with pytest.raises(StageError, match="control flow"):
        cast(source, tmp_path / "out")


def test_the_same_graph_gives_the_same_bytes(tmp_path):
    source = sinusoid(tmp_path / "in")
    cast(source, tmp_path / "one")
    cast(source, tmp_path / "two")
    for name in ("model.onnx", "model.onnx.data"):
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        assert one.exists() == two.exists()
        assert not one.exists() or one.read_bytes() == two.read_bytes()
