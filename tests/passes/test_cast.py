"""cast: bf16 beside fp16, nodes kept in float32 by name, and those that really overflow found by running samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdcompile.backends.trt import graph as trt_graph
from sdcompile.errors import StageError
from sdcompile.passes import PASSES, casting
from sdcompile.passes.base import read_effect
from sdcompile.samples import Writer
from sdcompile.spec import Job
from sdcompile.steps import ranges
from sdcompile.steps.widening import widen

pytestmark = pytest.mark.tiny
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
FLOAT, HALF, BRAIN = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


def save(folder: Path, gain: float = 1.0, opset: int = 22) -> Path:
    """y = softmax(x W * gain / gain) V: with a large gain, fp16 has no number for what stands between."""
    random = np.random.default_rng(0)
    weights = {
        "w": random.standard_normal((8, 8)).astype(np.float32), "v": random.standard_normal((8, 8)).astype(np.float32),
        "gain": np.float32(gain),
    }  # fmt: skip
    make = onnx.helper.make_node
    nodes = [
        make("MatMul", ["x", "w"], ["product"], name="net.first.linear/MatMul_0"),
        make("Mul", ["product", "gain"], ["large"], name="net.first.scale/Mul_0"),
        make("Div", ["large", "gain"], ["small"], name="net.first.scale/Div_0"),
        make("Softmax", ["small"], ["weights"], name="net.second/Softmax_0"),
        make("MatMul", ["weights", "v"], ["y"], name="net.second/MatMul_0"),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, FLOAT, ("B", 8)) for name in ("x", "y")]
    initializers = [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    folder.mkdir(parents=True)
    onnx.save(onnx.shape_inference.infer_shapes(model), folder / "model.onnx")
    return folder


def recorded(folder: Path, held_out: bool = False) -> Path:
    folder.mkdir()
    writer = Writer(folder)
    for number in range(4):
        feeds = {"x": np.random.default_rng(number).standard_normal((2, 8)).astype(np.float32)}
        told = {"prompt": "p", "step": number, "timestep": 1.0, "region": "early", "shape": "opt", "held_out": held_out}
        writer.add("unet", told, feeds, {"y": feeds["x"]})
    writer.index([])
    return folder


def cast(source: Path, out: Path, kind: str = "fp16", samples: Path | None = None, **params):
    """(the model cast, its effect)."""
    out.mkdir()
    inputs = {"onnx": source} | ({"samples": samples} if samples else {})
    PASSES[f"cast_{kind}"].run(inputs, out, Job("unet", {"family": "sd", **params}))
    onnx.checker.check_model(out / "model.onnx", full_check=True)
    return onnx.load(out / "model.onnx"), read_effect(out)


def in_half(folder: Path, x: np.ndarray) -> np.ndarray:
    """What the graph gives in real half precision: ONNX's reference computes fp16 in fp16, as a GPU does."""
    from onnx.reference import ReferenceEvaluator

    with np.errstate(over="ignore", invalid="ignore"):
        return ReferenceEvaluator(str(folder / "model.onnx")).run(None, {"x": x})[0]


def in_runtime(folder: Path, x: np.ndarray) -> np.ndarray:
    import onnxruntime as ort

    return ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


X = np.random.default_rng(9).standard_normal((2, 8)).astype(np.float32)


def test_nodes_around_a_value_that_really_overflows_are_kept_and_named(tmp_path):
    source, samples = save(tmp_path / "in", gain=60000.0), recorded(tmp_path / "samples")
    cast(source, tmp_path / "plain")
    assert not np.isfinite(in_half(tmp_path / "plain", X)).all(), "fp16 has no such number"
    _, effect = cast(source, tmp_path / "kept", samples=samples, from_samples=True)
    np.testing.assert_allclose(in_half(tmp_path / "kept", X), in_half(source, X), atol=5e-3)
    kept = {row["node"]: row["why"] for row in effect["kept"]}
    assert set(kept) == {"net.first.scale/Mul_0", "net.first.scale/Div_0"}
    assert kept["net.first.scale/Mul_0"].startswith("its value reaches ")
    assert kept["net.first.scale/Div_0"].startswith("reads a value that reaches ")
    assert (effect["kept_count"], effect["operators"], effect["ranges"]["beyond"]) == (2, 5, 1)
    assert effect["ranges"]["largest"]["node"] == "net.first.scale/Mul_0"


def test_where_nothing_overflows_nothing_is_kept(tmp_path):
    source, samples = save(tmp_path / "in", gain=1000.0), recorded(tmp_path / "samples")
    _, effect = cast(source, tmp_path / "out", samples=samples, from_samples=True)
    assert (effect["kept"], effect["ranges"]["beyond"]) == ([], 0)
    np.testing.assert_allclose(in_half(tmp_path / "out", X), in_half(source, X), atol=5e-3)


def test_headroom_keeps_what_comes_near(tmp_path):
    source, samples = save(tmp_path / "in", gain=1000.0), recorded(tmp_path / "samples")
    _, effect = cast(source, tmp_path / "out", samples=samples, from_samples=True, headroom=50.0)
    assert effect["kept_count"] == 2


def test_the_check_of_ranges_sees_a_kept_value_that_is_cast_after_all(tmp_path):
    # Named alone, the node that overflows is float32 and its reader is not: the cast between them is infinite.
    source, samples = save(tmp_path / "in", gain=60000.0), recorded(tmp_path / "samples")
    cast(source, tmp_path / "half", keep_fp32=("net.first.scale/Mul_0",))
    cast(source, tmp_path / "whole", keep_fp32=("net.first.scale/*",))
    from sdcompile.samples import Samples

    found = {
        name: ranges.check(source, tmp_path / name, Samples(samples, "unet"), tmp_path, lambda *_: None)
        for name in ("half", "whole")
    }
    assert [row["node"] for row in found["half"]["beyond"]] == ["net.first.scale/Mul_0"]
    assert found["whole"]["beyond"] == []


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("Softmax", {"net.second/Softmax_0"}),
        ("MatMul", {"net.first.linear/MatMul_0", "net.second/MatMul_0"}),
        ("net.first.scale/Div_*", {"net.first.scale/Div_0"}),
        ("first.scale", {"net.first.scale/Mul_0", "net.first.scale/Div_0"}),
        ("*.linear", {"net.first.linear/MatMul_0"}),
    ],
)
def test_nodes_are_kept_by_operator_node_or_module(pattern, kept, tmp_path):
    model, effect = cast(save(tmp_path / "in"), tmp_path / "out", keep_fp32=(pattern,))
    assert {row["node"] for row in effect["kept"]} == kept
    assert {row["why"] for row in effect["kept"]} == {f"named by {pattern!r}"}
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    outputs = {node.name: node.output[0] for node in model.graph.node}
    for name in ("net.first.linear/MatMul_0", "net.first.scale/Mul_0", "net.first.scale/Div_0", "net.second/Softmax_0"):
        assert types[outputs[name]] == (FLOAT if name in kept else HALF)
    assert trt_graph.promise(tmp_path / "out" / "model.onnx").kept == kept, "whoever judges an engine is told"


@pytest.mark.parametrize("pattern", ["LayerNorm", "second.norm", "net.third/*"])
def test_a_pattern_that_matches_nothing_is_refused(pattern, tmp_path):
    with pytest.raises(StageError, match=r"keep_fp32 matches no node") as refused:
        cast(save(tmp_path / "in"), tmp_path / "out", keep_fp32=("Softmax", pattern))
    assert "MatMul" in refused.value.hint


def test_a_stand_in_takes_what_it_inherits_and_has_no_node_for(tmp_path):
    _, effect = cast(save(tmp_path / "in"), tmp_path / "out", keep_fp32=("Softmax", "second.norm"), inherited=True)
    assert {row["why"] for row in effect["kept"]} == {"named by 'Softmax'"}


def test_without_a_sample_to_measure_with_it_stops(tmp_path):
    source, samples = save(tmp_path / "in"), recorded(tmp_path / "samples", held_out=True)
    with pytest.raises(StageError, match="nothing was recorded"):
        cast(source, tmp_path / "out", samples=samples, from_samples=True)


def test_bf16_is_half_the_bytes_float32_outside_and_its_own_type_inside(tmp_path):
    model, effect = cast(save(tmp_path / "in", gain=60000.0), tmp_path / "out", "bf16")
    assert {w.data_type for w in model.graph.initializer} == {BRAIN}
    assert [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)] == [FLOAT, FLOAT]
    assert (effect["type"], effect["kept"]) == ("bfloat16", [])


def test_bf16_computed_wide_is_as_far_from_fp32_as_bf16_is_and_no_nearer(tmp_path):
    source = save(tmp_path / "in", gain=60000.0)
    cast(source, tmp_path / "out", "bf16")
    widen(tmp_path / "out", tmp_path / "wide")
    exact, found = in_runtime(source, X), in_runtime(tmp_path / "wide", X)
    error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    # 8 bits of mantissa: fp16's 11 would give a tenth of it, fp32 nothing.
    assert 1e-3 < error < 3e-2


def test_masks_stay_finite_in_bf16():
    mask = casting.brain_of(np.float32([0, -3.4028235e38, np.inf, 1.5]), "mask").astype(np.float32)
    assert np.isfinite(mask).tolist() == [True, True, False, True]
    assert mask[1] < -3e38
    with pytest.raises(StageError, match="mask holds nan"):
        casting.brain_of(np.float32([np.nan]), "mask")


def test_the_word_for_kept_nodes_is_one():
    assert casting.KEPT == trt_graph.KEPT
