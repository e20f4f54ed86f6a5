"""Verification where the engine cannot run: its ONNX stands in, overflow is looked for, and the report says so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sdcompile.backends import onnxruntime
from sdcompile.backends.base import Card, write_card
from sdcompile.passes import PASSES, calculator
from sdcompile.samples import Writer
from sdcompile.spec import ComponentSpec, Job, Range, TensorSpec
from sdcompile.steps import verify, verify_images
from sdcompile.steps.report import fault, reports, stood_in

pytestmark = pytest.mark.tiny
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SPEC = ComponentSpec("unet", (TensorSpec("x", ("B", 8), "float32"),), (TensorSpec("y", ("B", 8), "float32"),))
SHAPES = {"B": Range(1, 2, 4)}
CLAIMS = {"engines": {"portable": {"claims": [{"claim": "it is", "found": "so", "holds": True}]}}}


def save(folder: Path, gain: float = 1.0, bias: float = 0.0, mixed: float = 0.0) -> Path:
    """y = (x W * gain) / gain + bias + a mask that is minus infinity nowhere it counts + `mixed` of all rows' mean."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    mask = np.zeros(8, np.float32)
    weights = {
        "w": random.standard_normal((8, 8)).astype(np.float32), "gain": np.float32(gain), "bias": np.float32(bias),
        "mask": np.where(np.arange(8) < 8, mask, -np.inf).astype(np.float32), "far": np.float32(-1e38),
        "mixed": np.float32(mixed), "rows": np.array([0]),
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="net.linear/MatMul_0"),
        helper.make_node("Mul", ["product", "gain"], ["large"], name="net.scale/Mul_0"),
        helper.make_node("Div", ["large", "gain"], ["small"], name="net.scale/Div_0"),
        helper.make_node("Add", ["small", "bias"], ["shifted"], name="net.bias/Add_0"),
        helper.make_node("Mul", ["mask", "far"], ["masked"], name="net.mask/Mul_0"),
        helper.make_node("Sub", ["shifted", "masked"], ["y" if not mixed else "own"], name="net.mask/Sub_0"),
    ]
    if mixed:
        nodes += [
            helper.make_node("ReduceMean", ["x", "rows"], ["mean"], name="net.mix/ReduceMean_0"),
            helper.make_node("Mul", ["mean", "mixed"], ["part"], name="net.mix/Mul_0"),
            helper.make_node("Add", ["own", "part"], ["y"], name="net.mix/Add_0"),
        ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("B", 8)) for name in ("x", "y")]
    graph = helper.make_graph(
        nodes,
        "g",
        ends[:1],
        ends[1:],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items() if mixed or n not in ("mixed", "rows")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    folder.mkdir(parents=True)
    onnx.save(onnx.shape_inference.infer_shapes(model), folder / "model.onnx")
    return folder


def report(folder: Path, *, gain: float = 1.0, wrong: float = 0.0, mixed: float = 0.0, table: dict = CLAIMS) -> dict:
    """Verify an fp16 engine of tensorrt_rtx that no GPU runs; `wrong` is added to what the engine was built from."""
    exported = save(folder / "exported", gain, mixed=mixed)
    typed, engine, out = folder / "typed", folder / "engine", folder / "out"
    for path in (typed, engine, out):
        path.mkdir()
    source = exported if not wrong else save(folder / "wrong", gain, wrong)
    job = Job("unet", {"family": "sd", "options": {}}, "fp16", SPEC, SHAPES)
    PASSES["cast_fp16"].run({"onnx": source}, typed, job)
    write_card(engine, Card("tensorrt_rtx", "unet", "fp16", SPEC, SHAPES, job.params))
    (engine / "layers.json").write_text(json.dumps(table))
    inputs = {"engine": engine, "onnx": typed, "exported": exported, "samples": recorded(folder / "samples", exported)}
    floor = {"min_snr_db": 35, "min_cosine": 0.999}
    params = {"backend": "tensorrt_rtx", "floor": floor, "stand_in": {"why": "no GPU"}}
    verify.run(inputs, out, Job("unet", {**job.params, **params}, "fp16", SPEC, SHAPES))
    assert {path.name for path in out.iterdir()} <= {"report.json", "worst.npz"}
    found: dict = json.loads((out / "report.json").read_text())
    return found


def recorded(folder: Path, exported: Path) -> Path:
    import onnxruntime as ort

    folder.mkdir()
    session = ort.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    writer = Writer(folder)
    for number, (rows, shape) in enumerate(((1, "min"), (2, "opt"), (2, "opt"), (4, "max"))):
        feeds = {"x": np.random.default_rng(number).standard_normal((rows, 8)).astype(np.float32)}
        told = {"prompt": "p", "step": number, "timestep": 1.0, "region": "early", "shape": shape}
        writer.add("unet", told, feeds, {"y": session.run(["y"], feeds)[0]})
    writer.index([])
    return folder


def test_the_onnx_stands_in_for_the_engine_and_the_report_says_so(tmp_path):
    found = report(tmp_path)
    assert found["passed"]
    assert (found["backend"], found["precision"]) == ("tensorrt_rtx", "fp16")
    assert found["stand_in"] == {"backend": "onnxruntime", "why": "no GPU"}
    assert found["proof"] == {"portable": CLAIMS["engines"]["portable"]["claims"]}
    assert "the engine was not run (no GPU)" in stood_in(found)
    assert found["ranges"]["beyond"] == []
    assert found["ranges"]["values"] == 5


def one_product(computes: str) -> dict:
    """layers.json of one product, whose builder wrote that all is well."""
    row = {"name": "g", "kind": "gemm", "computes": computes, "onnx": ["net.linear/MatMul_0"]}
    promise = {"attentions": [], "quantized": [], "kept": []}
    return {"promise": promise, "engines": {"portable": {**CLAIMS["engines"]["portable"], "layers": [row]}}}


@pytest.mark.parametrize(("computes", "passed"), [("Half", True), ("Float", False)])
def test_what_the_layer_table_shows_is_claimed_again_whatever_its_builder_wrote(computes, passed, tmp_path):
    found = report(tmp_path, table=one_product(computes))
    assert found["passed"] is passed
    assert [claim["holds"] for claim in found["proof"]["portable"]] == [passed, True]
    if not passed:
        told = fault(found).message
        assert "not so: no matrix product or convolution in float32" in told
        assert "net.linear/MatMul_0" in told


def test_a_bundles_layer_tables_are_read_again_when_it_is_verified_again(tmp_path, monkeypatch):
    folder = tmp_path / "components" / "unet"
    folder.mkdir(parents=True)
    write_card(folder, Card("tensorrt_rtx", "unet", "fp16", SPEC, SHAPES))
    entry = SimpleNamespace(precision="fp16", backend="tensorrt_rtx", verification={})
    manifest = SimpleNamespace(components={"unet": entry}, folder_of="components/{}".format, family="sd")
    monkeypatch.setattr(verify, "judge", lambda *_: {"passed": True, "backend": "tensorrt_rtx"})
    monkeypatch.setattr(verify, "Samples", lambda *_: None)
    monkeypatch.setattr(verify_images, "recheck", lambda *_: {"passed": True})
    for computes, passed in (("Half", True), ("Float", False)):
        (folder / "layers.json").write_text(json.dumps(one_product(computes)))
        again = verify.recheck(tmp_path, manifest, tmp_path)["unet"]  # type: ignore[arg-type]
        assert again["passed"] is passed


@pytest.mark.parametrize(("positions", "largest"), [(4096, 4), (1, 1), (3, 2)])
def test_large_calls_are_made_a_few_rows_at_a_time(positions, largest, tmp_path, monkeypatch):
    monkeypatch.setattr(calculator, "POSITIONS", positions)
    sizes = []
    plain = onnxruntime.OnnxRuntimeEngine.__call__

    def spied(self, feeds):
        sizes.append(len(feeds["x"]))
        return plain(self, feeds)

    monkeypatch.setattr(onnxruntime.OnnxRuntimeEngine, "__call__", spied)
    found = report(tmp_path)
    assert found["passed"]
    assert max(sizes) == largest
    assert sum(sizes) >= 1 + 2 + 2 + 4
    assert found["ranges"]["values"] == 5
    if positions == 4096:
        assert found["whole"] is None
    else:
        assert found["whole"]["passed"]
        assert found["whole"]["snr_db"] > 100
        assert found["whole"]["rows"] > largest


def test_a_graph_of_fixed_rows_is_called_with_all_of_them():
    assert calculator.parts([(2, 4, 64, 64), (2,)], [("R", 4, 64, 64), ("R",)]) == [slice(0, 1), slice(1, 2)]
    assert calculator.parts([(2, 4, 64, 64), (2,)], [(2, 4, 64, 64), (2,)]) == [slice(0, 2)]
    halves = calculator.parts([(5, 4, 32, 64), (5,)], [("R", 4, 32, 64), ("R",)])
    assert halves == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert calculator.rows_at_once([(2, 4, 128, 128)]) == 1, "a row is never cut"


def test_rows_that_depend_on_each_other_are_found_though_they_are_computed_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(calculator, "POSITIONS", 1)
    found = report(tmp_path, mixed=0.02)
    assert found["worst"]["passed"], "so little is within the floor of fp16"
    assert not found["passed"]
    assert found["whole"]["rows"] == 2, "one row more than is computed at once"
    assert found["whole"]["snr_db"] < 60
    told = fault(found).message
    assert "rows at once otherwise than one after the other" in told
    _, junit = reports({"unet": found})
    assert "rows at once otherwise" in junit


def test_another_function_than_the_reference_is_found_out_and_blamed_on_the_onnx(tmp_path):
    found = report(tmp_path, wrong=0.5)
    assert not found["passed"]
    assert "the ONNX (run by onnxruntime, not the engine) of unet" in fault(found).message


def test_an_overflow_that_a_cpu_does_not_show_is_found_all_the_same(tmp_path):
    found = report(tmp_path, gain=50000.0)
    assert found["worst"]["snr_db"] > 35, "the CPU computes in fp32 and agrees"
    assert not found["passed"]
    (row,) = found["ranges"]["beyond"]
    assert (row["node"], row["value"]) == ("net.scale/Mul_0", "large")
    assert "the value of net.scale/Mul_0 reaches" in fault(found).message
    assert "where the largest fp16 is 65504" in fault(found).message


def test_a_large_value_within_fp16_is_no_overflow(tmp_path):
    found = report(tmp_path, gain=2000.0)
    assert found["passed"]
    assert 2000 < found["ranges"]["largest"]["max_abs"] < 65504
