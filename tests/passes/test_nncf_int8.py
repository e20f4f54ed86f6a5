"""INT8: what is quantized, what each group costs, what a budget leaves out, and what is refused."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from sdcompile.errors import StageError
from sdcompile.passes import nncf_int8
from sdcompile.passes.base import Setting
from sdcompile.samples import Samples, Writer
from sdcompile.spec import Job

pytestmark = pytest.mark.tiny

REGIONS = ("early", "mid", "late")
WIDTH = 16
LAYERS = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 1.0,
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0": 1.0,
    "unet.mid_block.resnets.0.conv1": 1.0,
    "unet.conv_out": 60.0,
}
"""Module path -> by how much one output channel of its weight is larger than the others.

One scale serves all values of an activation, so what follows a layer with one huge channel loses the others.
"""


@pytest.fixture(scope="module")
def form(tmp_path_factory) -> Path:
    """Four products in a row with a residual each, named as the exporter names them; their weights in a file."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    nodes, weights, value = [], [], "sample"
    for number, (path, outlier) in enumerate(LAYERS.items()):
        weight = draw.standard_normal((WIDTH, WIDTH)).astype("f") / 4
        weight[:, 0] *= outlier
        weights.append(numpy_helper.from_array(weight, f"w{number}"))
        product = helper.make_node("MatMul", [value, f"w{number}"], [f"p{number}"], name=f"{path}/MatMul_0")
        bent = helper.make_node("Tanh", [f"p{number}"], [f"t{number}"], name=f"{path}/Tanh_0")
        added = helper.make_node("Add", [value, f"t{number}"], [f"a{number}"], name=f"{path}/Add_0")
        for node in (product, bent, added):
            node.metadata_props.add(key="module", value=path)
        nodes += [product, bent, added]
        value = f"a{number}"
    nodes.append(helper.make_node("Identity", [value], ["out_sample"], name="root/Identity_0"))
    shape = ["R", 4, WIDTH]
    graph = helper.make_graph(
        nodes, "main", [helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, shape)], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    folder = tmp_path_factory.mktemp("onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=64)
    return folder


def record(folder: Path, form: Path, count: int = 16, spoil: int | None = None) -> Path:
    import onnxruntime as ort

    session = ort.InferenceSession(form / "model.onnx", providers=["CPUExecutionProvider"])
    draw = np.random.default_rng(1)
    writer = Writer(folder)
    folder.mkdir(exist_ok=True)
    for number in range(count):
        feeds = {"sample": draw.standard_normal((2, 4, WIDTH)).astype("f")}
        told = {
            "trajectory": "000", "prompt": "a red circle", "negative_prompt": "", "step": number,
            "timestep": 999.0 - number, "region": REGIONS[number * 3 // count], "shape": "opt",
            "held_out": number % 4 == 3,
        }  # fmt: skip
        writer.add("unet", told, feeds, {"out_sample": session.run(None, feeds)[0]})
    writer.index([])
    if spoil is not None:
        from safetensors.numpy import load_file, save_file

        path = folder / "unet" / f"{spoil:03d}.safetensors"
        save_file({k: v * np.float32(np.nan) for k, v in load_file(path).items()}, path)
    return folder


@pytest.fixture(scope="module")
def recorded(form, tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("samples"), form)


def quantize(form: Path, recorded: Path, out: Path, **params: object) -> dict:
    out.mkdir()
    nncf_int8.run({"onnx": form, "samples": recorded}, out, Job("unet", {"family": "sd", **params}))
    return json.loads((out / "effect.json").read_text())


def worst_db(folder: Path, recorded: Path) -> float:
    """Lowest SNR of held out samples as ONNX Runtime computes the graph, int8 kernels and all."""
    import onnxruntime as ort

    from sdcompile import metrics

    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    found = []
    for sample in Samples(recorded, "unet", held_out=True):
        (answer,) = session.run(None, dict(sample.feeds))
        found.append(metrics.snr_db(sample.outputs["out_sample"], answer))
    return min(found)


def kinds(folder: Path) -> list[str]:
    import onnx

    return [node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node]


def test_everything_is_int8_smaller_and_close_to_the_reference(form, recorded, tmp_path):
    effect = quantize(form, recorded, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.onnx", "model.onnx.data", "effect.json"}
    assert effect["quantized"] == effect["operators"] == len(LAYERS)
    assert kinds(tmp_path / "out").count("DequantizeLinear") == 2 * len(LAYERS)
    assert set(effect["snr_db"]) == set(REGIONS)
    assert worst_db(tmp_path / "out", recorded) == pytest.approx(min(effect["snr_db"].values()), abs=1.5)
    assert min(effect["snr_db"].values()) > 20


def test_quantizing_again_gives_the_same_bytes(form, recorded, tmp_path):
    for name in ("a", "b"):
        quantize(form, recorded, tmp_path / name, sensitivity=True)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_the_group_with_outliers_is_found_and_left_out_first(form, recorded, tmp_path):
    quantize(form, recorded, tmp_path / "all", sensitivity=True)
    told = json.loads((tmp_path / "all" / "sensitivity.json").read_text())
    groups = [row["name"] for row in told["groups"]]
    assert set(groups) == {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "down_blocks.0.attentions.0.transformer_blocks.0.ff",
        "mid_block.resnets.0", "conv_out",
    }  # fmt: skip
    worst = min(told["all"].values())
    floor = worst + 3
    effect = quantize(form, recorded, tmp_path / "mixed", sensitivity=True, budget={"min_snr_db": floor})
    assert effect["left_out"]
    assert effect["left_out"][0] == groups[0]
    blocks = quantize(form, recorded, tmp_path / "blocks", budget={"min_snr_db": floor})
    assert len(blocks["left_out"]) <= len(effect["left_out"]), "blocks first: no more groups, for fewer measurements"
    assert min(blocks["snr_db"].values()) >= floor
    assert min(effect["snr_db"].values()) >= floor > worst
    assert effect["quantized"] == len(LAYERS) - len(effect["left_out"])
    assert worst_db(tmp_path / "mixed", recorded) >= floor - 0.5


def test_a_budget_that_int8_holds_leaves_nothing_out(form, recorded, tmp_path):
    assert quantize(form, recorded, tmp_path / "out", budget={"min_snr_db": 10})["left_out"] == []


def test_a_budget_no_int8_can_hold_is_refused(form, recorded, tmp_path):
    with pytest.raises(StageError, match="the budget of 110 dB cannot be held by any int8"):
        quantize(form, recorded, tmp_path / "out", budget={"min_snr_db": 110})


def test_symmetric_int8_has_no_unsigned_type_and_no_zero_point(form, recorded, tmp_path):
    import onnx
    from onnx import TensorProto, numpy_helper

    from sdcompile.passes import qdq

    quantize(form, recorded, tmp_path / "plain")
    quantize(form, recorded, tmp_path / "symmetric", symmetric=True)
    zeros = [t for t in onnx.load(tmp_path / "symmetric" / "model.onnx").graph.initializer if "zero_point" in t.name]
    assert zeros
    assert all(t.data_type == TensorProto.INT8 and not numpy_helper.to_array(t).any() for t in zeros)
    with pytest.raises(StageError, match="symmetric int8 was asked for"):
        qdq.check(qdq.load(tmp_path / "plain" / "model.onnx"), symmetric=True)


def test_weights_alone_keep_activations_in_float(form, recorded, tmp_path):
    effect = quantize(form, recorded, tmp_path / "out", mode="weights")
    assert "QuantizeLinear" not in kinds(tmp_path / "out")
    assert kinds(tmp_path / "out").count("DequantizeLinear") == len(LAYERS)
    assert worst_db(tmp_path / "out", recorded) > 35
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size < (form / "model.onnx.data").stat().st_size / 2
    assert effect["quantized"] == len(LAYERS)


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_in_four_bits_are_read_by_kernels_of_both_engines(form, recorded, tmp_path, symmetric):
    import onnxruntime as ort
    import openvino

    from sdcompile import metrics

    effect = quantize(
        form, recorded, tmp_path / "out", mode="weights", bits=4, group_size=16, symmetric=symmetric
    )  # fmt: skip
    assert (effect["quantized"], effect["bits4"]) == (len(LAYERS), len(LAYERS))
    assert kinds(tmp_path / "out").count("DequantizeLinear") == len(LAYERS)
    eight = quantize(form, recorded, tmp_path / "eight", mode="weights", symmetric=symmetric)
    assert 12 < min(effect["snr_db"].values()) < min(eight["snr_db"].values())

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = ort.InferenceSession(
        tmp_path / "out" / "model.onnx", options, providers=["CPUExecutionProvider"]
    )  # fmt: skip
    import onnx

    assert [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node].count("MatMulNBits") == len(LAYERS)
    compiled = openvino.Core().compile_model(
        tmp_path / "out" / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    told = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    products = [row["runtimePrecision"].value for row in told if row["layerType"].value == "FullyConnected"]
    assert products == ["i4" if symmetric else "u4"] * len(LAYERS)
    sample = next(iter(Samples(recorded, "unet", held_out=True)))
    first, second = session.run(None, dict(sample.feeds))[0], compiled(dict(sample.feeds))[0]
    # Both quantize the activations of such layers at run time, each in its own way.
    assert metrics.snr_db(first, second) > 40
    assert metrics.snr_db(sample.outputs["out_sample"], first) < 35, "the sibling: the float graph is another function"


def engine(backend: str, source: Path, out: Path, **options: object):
    """The engine of `backend` on the ONNX in `source`."""
    from sdcompile.backends import BACKENDS, Host
    from sdcompile.spec import ComponentSpec, Range, TensorSpec

    ends = [TensorSpec(name, ("R", 4, WIDTH), "float32") for name in ("sample", "out_sample")]
    job = Job(
        "unet", {"family": "sd", "options": options, "rest": "fp32"}, "int8",
        ComponentSpec("unet", (ends[0],), (ends[1],)), {"R": Range(2, 2, 2)},
    )  # fmt: skip
    out.mkdir()
    BACKENDS[backend].build(source, out, job)
    return BACKENDS[backend].open(out, Host())


FOUR = {"mode": "weights", "bits": 4, "group_size": 16}


@pytest.mark.parametrize(
    ("backend", "params", "precision", "count"),
    [
        ("openvino", {}, "int8", "int8_operators"),
        ("openvino", {"mode": "weights"}, "fp32", "int8_weights"),
        ("openvino", FOUR, "fp32", "int4_weights"),
        ("onnxruntime", {}, "int8", "int8_operators"),
        ("onnxruntime", {"mode": "weights"}, "fp32", ""),
        ("onnxruntime", {"mode": "dynamic"}, "int8", "int8_operators"),
        ("onnxruntime", FOUR, "fp32", "int4_weights"),
    ],
)
def test_engines_say_what_they_compute_in(form, recorded, tmp_path, backend, params, precision, count):
    quantize(form, recorded, tmp_path / "onnx", **params)
    facts = engine(backend, tmp_path / "onnx", tmp_path / "engine").facts
    assert facts["precision"] == precision
    assert not count or facts[count] == len(LAYERS)


def test_four_bits_that_would_be_widened_are_refused(form, recorded, tmp_path):
    quantize(form, recorded, tmp_path / "onnx", **FOUR)
    with pytest.raises(StageError, match="ONNX Runtime would widen them all"):
        engine("onnxruntime", tmp_path / "onnx", tmp_path / "engine", graph_optimization="disable")


def test_layers_that_groups_do_not_divide_get_eight_bits(form, recorded, tmp_path):
    with pytest.raises(StageError, match="groups of 32 divide, so none can have 4 bits"):
        quantize(form, recorded, tmp_path / "out", mode="weights", bits=4, group_size=32)


def test_four_bits_take_a_budget(form, recorded, tmp_path):
    plain = quantize(form, recorded, tmp_path / "all", mode="weights", bits=4, group_size=16)
    floor = min(plain["snr_db"].values()) + 2
    held = quantize(
        form, recorded, tmp_path / "out", mode="weights", bits=4, group_size=16, budget={"min_snr_db": floor}
    )
    assert held["left_out"]
    assert min(held["snr_db"].values()) >= floor
    assert held["bits4"] == len(LAYERS) - len(held["left_out"])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_a_weight_come_back_within_half_a_level(symmetric, transposed):
    from sdcompile.passes import qdq, weights

    draw = np.random.default_rng(0).standard_normal((32, 6)).astype("f")
    draw[:16, 0] = 0
    values, axis = (draw.T, 1) if transposed else (draw, 0)
    scale, zero = weights.grouped(values, axis, 16, symmetric=symmetric)
    assert scale.shape == zero.shape == ((6, 2) if transposed else (2, 6))
    levels = qdq.quantized(values, scale, zero, axis, 16).astype("f")
    back = (levels - np.repeat(zero.astype("f"), 16, axis)) * np.repeat(scale, 16, axis)
    half = np.repeat(np.abs(scale), 16, axis) / 2
    # Of symmetric groups the end opposite to the largest value is one level short.
    assert (np.abs(back - values) <= half * (2.01 if symmetric else 1.01)).all()
    assert np.mean(np.abs(back - values) <= half * 1.01) > 0.9
    assert not back[values == 0].any()


def test_activations_quantized_at_run_time_need_no_ranges(form, recorded, tmp_path):
    effect = quantize(form, recorded, tmp_path / "out", mode="dynamic")
    assert effect["quantized"] == len(LAYERS)
    assert kinds(tmp_path / "out").count("MatMulInteger") == len(LAYERS)
    assert "MatMul" not in kinds(tmp_path / "out")
    static = quantize(form, recorded, tmp_path / "static")
    assert min(effect["snr_db"].values()) > min(static["snr_db"].values())
    assert worst_db(tmp_path / "out", recorded) == pytest.approx(min(effect["snr_db"].values()), abs=0.5)
    partly = quantize(form, recorded, tmp_path / "partly", mode="dynamic", ignore=["conv_out"])
    assert partly["quantized"] == len(LAYERS) - 1
    with pytest.raises(StageError, match="no linear layer left"):
        quantize(form, recorded, tmp_path / "none", mode="dynamic", ignore=["**"])


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"bits": 4}, "bits: 4 is for `mode: weights`"),
        ({"group_size": 64}, "group_size is for `bits: 4`"),
        ({"mode": "weights", "bits": 4, "group_size": 48}, "no power of two"),
        ({"mode": "dynamic", "sensitivity": True}, "budget and sensitivity"),
        ({"mode": "weights", "smooth_quant": True}, "smooth_quant: true is for `mode: static`"),
        ({"mode": "weights", "bias_correction": "fast"}, "bias_correction: fast is for `mode: static`"),
        ({"mode": "dynamic", "model_type": "any"}, "model_type: any is for `mode: static`"),
        ({"smooth_quant_alpha": 0.5}, "smooth_quant_alpha: 0.5 is for `smooth_quant: true`"),
        ({"symmetric": True, "model_type": "any"}, "symmetric: true .* is for `model_type: transformer`"),
        ({"symmetric": True, "mode": "dynamic"}, "symmetric: true .* is not for `mode: dynamic`"),
    ],
)
def test_parameters_that_do_not_fit_together_are_refused(params, words):
    with pytest.raises(ValueError, match=words):
        nncf_int8.Params.model_validate(params)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("mid_block", 3), ("**.ff", 3), ("attn1.to_q", 3), ("down_blocks.0", 2), ("down_blocks.*.attentions", 2)],
)
def test_ignored_modules_stay_in_float(form, recorded, tmp_path, pattern, expected):
    assert quantize(form, recorded, tmp_path / "out", ignore=[pattern])["quantized"] == expected


def test_the_comparison_of_tokens_that_merge_stays_in_float(form, tmp_path):
    import onnx

    model = onnx.load(form / "model.onnx")
    old, new = "transformer_blocks.0.ff.net.0", "transformer_blocks.0.token_merge"
    for node in model.graph.node:
        node.name = node.name.replace(old, new)
        for entry in node.metadata_props:
            entry.value = entry.value.replace(old, new)
    (tmp_path / "form").mkdir()
    onnx.save(model, tmp_path / "form" / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    effect = quantize(tmp_path / "form", record(tmp_path / "samples", form), tmp_path / "out")
    assert (effect["quantized"], effect["operators"]) == (3, 4)
    whole = quantize(form, tmp_path / "samples", tmp_path / "whole")
    assert whole["quantized"] == 4, "the sibling: under another name it is quantized"


def test_a_pattern_that_matches_nothing_is_an_error(form, recorded, tmp_path):
    with pytest.raises(StageError, match="'attn3' matches no module") as caught:
        quantize(form, recorded, tmp_path / "out", ignore=["mid_block", "attn3"])
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1" in caught.value.message


def test_fitting_runs_without_an_arena_and_leaves_nncf_as_it_was(form, recorded, tmp_path, monkeypatch):
    import onnxruntime as ort
    from nncf.onnx import engine
    from nncf.onnx.quantization import quantize_model
    from nncf.onnx.statistics.aggregator import ONNXStatisticsAggregator

    opened, plain, collect = [], ort.InferenceSession, ONNXStatisticsAggregator.collect_statistics
    load = quantize_model.load_external_data_for_model

    def session(model, options, **rest):
        opened.append((options, plain(model, options, **rest)))
        return opened[-1][1]

    monkeypatch.setattr(ort, "InferenceSession", session)
    quantize(form, recorded, tmp_path / "out")
    options, fitting = next(pair for pair in opened if not pair[0].enable_cpu_mem_arena)
    assert not options.enable_mem_pattern
    assert options.get_session_config_entry("session.disable_prepacking") == "1"
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # What it measures are activations: a weight among a graph's outputs is copied at every sample.
    assert {output.name for output in fitting.get_outputs()} == {"sample", "a0", "a1", "a2", "out_sample"}
    assert engine.rt is ort
    assert ONNXStatisticsAggregator.collect_statistics is collect
    assert quantize_model.load_external_data_for_model is load


@pytest.mark.parametrize(
    "params", [{}, {"symmetric": True}, {"bias_correction": "fast"}, {"smooth_quant": True}], ids=str
)
def test_weights_measured_from_their_file_have_the_ranges_nncf_gives_them(
    form, recorded, tmp_path, monkeypatch, params
):
    from sdcompile.passes import nncf_manners

    moved, change = [], nncf_manners._change

    def spied(theirs):
        def put(name, model, value):
            change(theirs)(name, model, value)
            (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
            moved.append(bool(tensor.external_data) and not tensor.raw_data)

        return put

    monkeypatch.setattr(nncf_manners, "_LARGE_BYTES", 64)
    monkeypatch.setattr(nncf_manners, "_change", spied)
    quantize(form, recorded, tmp_path / "lean", **params)
    assert moved == [True] * len(LAYERS) * ("smooth_quant" in params), "what SmoothQuant changes goes to a file"
    assert {path.name for path in form.iterdir()} == {"model.onnx", "model.onnx.data"}, "and not beside the source"

    @contextmanager
    def as_they_come():
        from nncf.onnx.quantization import quantize_model

        with monkeypatch.context() as patch:
            patch.setattr(quantize_model, "load_external_data_for_model", lambda model, folder: None)
            yield

    monkeypatch.setattr(nncf_int8.nncf_manners, "lean", as_they_come)
    quantize(form, recorded, tmp_path / "plain", **params)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "lean" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_stand_in_takes_what_it_inherits_and_has_no_module_for(form, recorded, tmp_path):
    made = quantize(form, recorded, tmp_path / "out", ignore=["mid_block", "attn3"], inherited=True)
    assert made["quantized"] == quantize(form, recorded, tmp_path / "same", ignore=["mid_block"])["quantized"]


def test_ignoring_everything_is_not_called_int8(form, recorded, tmp_path):
    with pytest.raises(StageError, match="nothing in this graph is quantized"):
        quantize(form, recorded, tmp_path / "out", ignore=["**"])


def test_a_quantized_graph_is_refused(form, recorded, tmp_path):
    quantize(form, recorded, tmp_path / "out")
    with pytest.raises(StageError, match="quantized already"):
        quantize(tmp_path / "out", recorded, tmp_path / "again")


def test_samples_with_nan_are_refused(form, tmp_path):
    with pytest.raises(StageError, match="recorded sample 004 holds NaN"):
        quantize(form, record(tmp_path / "bad", form, spoil=4), tmp_path / "out")


def test_a_component_without_samples_is_refused(form, recorded, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match="vae: no sample was recorded to fit ranges to"):
        nncf_int8.run({"onnx": form, "samples": recorded}, tmp_path / "out", Job("vae", {}))


def test_the_noise_of_groups_adds_up(form, recorded, tmp_path):
    """What `choose` builds on: the sum over groups alone is near what all of them give together."""
    quantize(form, recorded, tmp_path / "all", sensitivity=True)
    told = json.loads((tmp_path / "all" / "sensitivity.json").read_text())
    for region in REGIONS:
        added = sum(10 ** (-row["snr_db"][region] / 10) for row in told["groups"])
        assert -10 * np.log10(added) == pytest.approx(told["all"][region], abs=3)


def test_integers_are_those_of_onnx(form):
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    from sdcompile.passes.qdq import quantized

    weight = np.array([[-300.0, -0.5, 0.5, 1.5], [2.5, 3.49, 126.6, 900.0]], "f")
    scale, zero = np.array([1.0, 2.0], "f"), np.array([0, 3], np.int8)
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], axis=0)
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "s")]
    infos.append(helper.make_tensor_value_info("z", TensorProto.INT8, None))
    graph = helper.make_graph([node], "q", infos, [helper.make_tensor_value_info("y", TensorProto.INT8, None)])
    (expected,) = ReferenceEvaluator(helper.make_model(graph)).run(None, {"x": weight, "s": scale, "z": zero})
    np.testing.assert_array_equal(quantized(weight, scale, zero, 0), expected)


@pytest.mark.parametrize("mode", ["static", "weights", "dynamic"])
def test_weights_that_the_store_shares_with_an_engine_are_read_all_the_same(form, recorded, tmp_path, mode):
    for path in form.iterdir():
        (tmp_path / "shared").mkdir(exist_ok=True)
        (tmp_path / "shared" / path.name).hardlink_to(path)
    try:
        assert quantize(tmp_path / "shared", recorded, tmp_path / "out", mode=mode)["quantized"] > 0
    finally:
        for path in (tmp_path / "shared").iterdir():
            path.unlink()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.onnx", "model.onnx.data", "effect.json"}


def test_the_products_inside_an_attention_are_found_by_the_softmax_between_them():
    import onnx_ir as ir
    from onnx import TensorProto, helper

    from sdcompile.passes import qdq

    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["q"], name="to_q"),
        helper.make_node("MatMul", ["q", "x"], ["s"], name="scores"),
        helper.make_node("Mul", ["s", "x"], ["scaled"], name="scale"),
        helper.make_node("Add", ["scaled", "x"], ["masked"], name="mask"),
        helper.make_node("Softmax", ["masked"], ["p"], name="softmax"),
        helper.make_node("MatMul", ["p", "x"], ["o"], name="weigh"),
        helper.make_node("MatMul", ["o", "x"], ["y"], name="to_out"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (4, 4)) for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]))
    assert qdq.inside_attentions(ir.serde.deserialize_model(model).graph) == {"scores", "weigh"}


def test_a_pair_before_a_resize_belongs_to_the_layer_behind_it():
    import onnx_ir as ir
    from onnx import TensorProto, helper

    from sdcompile.passes import qdq

    def pair(source, number):
        names = [f"q{number}", f"d{number}"]
        return [
            helper.make_node("QuantizeLinear", [source, "s", "z"], names[:1], name=names[0]),
            helper.make_node("DequantizeLinear", [names[0], "s", "z"], names[1:], name=names[1]),
        ]

    nodes = [
        *pair("x", 0),
        helper.make_node("Resize", ["d0", "", "scales"], ["r"], name="unet.up.upsamplers.0/Resize_0"),
        *pair("r", 1),
        helper.make_node("Conv", ["d1", "w"], ["y"], name="unet.up.upsamplers.0.conv/Conv_0"),
    ]
    constants = [
        helper.make_tensor("s", TensorProto.FLOAT, (), [0.1]), helper.make_tensor("z", TensorProto.INT8, (), [0]),
        helper.make_tensor("scales", TensorProto.FLOAT, (4,), [1, 1, 2, 2]),
        helper.make_tensor("w", TensorProto.FLOAT, (1, 1, 1, 1), [1.0]),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 1, None, None)) for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], constants))
    model = ir.serde.deserialize_model(model)
    assert [set(fed) for _, _, fed in qdq.pairs(model.graph)] == [{"up.upsamplers.0"}] * 2
    assert qdq.groups(model.graph) == {"up.upsamplers.0": ["unet.up.upsamplers.0.conv/Conv_0"]}
    qdq.keep_only(model, set())
    assert [node.op_type for node in model.graph] == ["Resize", "Conv"]


def judged(alone: dict[str, list[float]], measured: list[tuple[str, ...]]):
    """A judge of two samples to which the noise of groups adds up exactly; `measured` gets what it was asked."""

    class Judge:
        def noise(self, kept):
            measured.append(tuple(sorted(kept)))
            return np.sum([alone[name] for name in kept], 0, initial=0.0) + np.zeros(2)

    return Judge()


def test_the_plan_s_figures_hold_what_was_measured():
    from sdcompile.plan import memory

    unet = int(3.2 * memory.GIB)
    assert memory.needed(nncf_int8.PASS.memory, unet) > 6.13 * memory.GIB
    for smooth, times in ((False, 2.27), (True, 3.27)):
        disk = nncf_int8.PASS.disk(nncf_int8.Params(smooth_quant=smooth), Setting({}, None, {}, {}))
        assert disk >= times, "the graph with pairs in fp32, its weights rounded, the result, and what was changed"


def test_no_group_is_left_out_that_a_later_one_made_needless():
    from sdcompile.passes import sensitivity
    from sdcompile.spec import say_nothing

    # Of the first sample a is the worst and goes first; then c must go for the second one, and alone is enough.
    rows = {"a": [0.08, 0.0], "c": [0.07, 0.12], "d": [0.01, 0.02]}
    alone = {name: np.array(row) for name, row in rows.items()}
    measured: list[tuple[str, ...]] = []
    parts = sensitivity.Parts(judged(rows, measured), tuple(rows), alone, {})
    left_out, noise = sensitivity.choose(parts, sum(alone.values()), 10.0, say_nothing)
    assert left_out == ["c"]
    np.testing.assert_allclose(noise, [0.09, 0.02])
    assert measured == [("d",), ("a", "d")], "what was chosen is measured itself"
    rows["a"] = [0.095, 0.0]
    alone = {name: np.array(row) for name, row in rows.items()}
    parts = sensitivity.Parts(judged(rows, measured), tuple(rows), alone, {})
    left_out, _ = sensitivity.choose(parts, sum(alone.values()), 10.0, say_nothing)
    assert left_out == ["a", "c"], "the sibling: both are needed"


BLOCKS = {
    "down.0.a": [0.01, 0.01], "down.0.b": [0.02, 0.0], "mid.x": [0.005, 0.06],
    "up.0.a": [0.07, 0.01], "up.0.b": [0.01, 0.02], "up.0.c": [0.001, 0.003],
}  # fmt: skip


def test_only_the_blocks_that_matter_are_looked_into_and_the_choice_is_that_of_all_groups():
    from sdcompile.passes import sensitivity
    from sdcompile.spec import say_nothing

    everything = np.sum(list(BLOCKS.values()), 0)
    found, asked = {}, {}
    for blocks in (True, False):
        measured: list[tuple[str, ...]] = []
        parts = sensitivity.measure(judged(BLOCKS, measured), BLOCKS, say_nothing, blocks=blocks)
        found[blocks], asked[blocks] = sensitivity.choose(parts, everything, 12.0, say_nothing)[0], measured
        if blocks:
            assert set(parts.closed) == {"down.0"}, "up.0 was looked into, a block of one group is that group"
    assert found[True] == found[False] == ["up.0.a", "mid.x"]
    assert ("down.0.a",) in asked[False]
    assert ("down.0.a",) not in asked[True]
    told = sensitivity.report(
        sensitivity.Parts(_regions(), tuple(BLOCKS), {"down.0": np.array([0.03, 0.01])}, {"down.0": list(BLOCKS)[:2]}),
        {name: ["op"] for name in BLOCKS}, everything, [], everything,
    )  # fmt: skip
    (row,) = told["groups"]
    assert (row["name"], row["groups"], row["operators"]) == ("down.0", 2, 2)


def test_a_budget_out_of_reach_looks_into_every_block_and_is_refused():
    from sdcompile.passes import sensitivity
    from sdcompile.spec import say_nothing

    parts = sensitivity.measure(judged(BLOCKS, []), BLOCKS, say_nothing, blocks=True)
    with pytest.raises(StageError, match=r"all but the least sensitive group \(up\.0\.c\) left out the SNR is 25"):
        sensitivity.choose(parts, np.sum(list(BLOCKS.values()), 0), 40.0, say_nothing)
    assert not parts.closed


def _regions():
    class Judge:
        names, regions = ("000", "001"), ["early", "late"]
        samples = type("S", (), {"component": "unet"})

    return Judge()


def test_weights_are_judged_as_the_values_that_integers_stand_for(form, recorded, tmp_path, monkeypatch):
    """The graph that is judged has weights rounded beforehand: what the pairs themselves compute."""
    import onnx

    from sdcompile.passes import sensitivity
    from sdcompile.samples import Samples

    seen = {}
    whole = sensitivity.Judge.noise

    def noise(self, kept):
        found = whole(self, kept)
        variant = self.graph.with_name("variant.onnx")
        seen["kinds"] = [node.op_type for node in onnx.load(variant).graph.node]
        for what, path in (("rounded", variant), ("pairs", self.graph)):
            seen[what] = list(sensitivity.answers(path, Samples(recorded, "unet", held_out=True), self.names))
        seen["float"] = self.answers
        return found

    monkeypatch.setattr(sensitivity.Judge, "noise", noise)
    quantize(form, recorded, tmp_path / "out")
    pairs = kinds(tmp_path / "out")
    assert seen["kinds"].count("DequantizeLinear") == pairs.count("QuantizeLinear"), "those of activations alone"
    for rounded, told in zip(seen["rounded"], seen["pairs"], strict=True):
        for name in told:
            np.testing.assert_allclose(rounded[name], told[name], rtol=1e-4, atol=1e-5)
    assert any(np.abs(seen["float"][0][name] - seen["pairs"][0][name]).max() > 1e-3 for name in seen["float"][0])


def test_a_budget_is_held_after_biases_were_corrected_again(form, recorded, tmp_path, monkeypatch):
    """The second correction is made to miss the floor: another group goes, and what is told is what was written."""
    from sdcompile.passes import sensitivity

    worst = min(quantize(form, recorded, tmp_path / "all", bias_correction="fast")["snr_db"].values())
    floor = worst + 2
    inserted, more, plain = [], [], nncf_int8._insert_pairs

    def insert(inputs, graph, job, params, ignored):
        inserted.append(set(ignored))
        plain(inputs, graph, job, params, ignored)

    judged_noise = sensitivity.Judge.noise

    def noise(self, kept):
        found = judged_noise(self, kept)
        if len(inserted) != 2:
            return found
        if kept is None:
            more.append(1.05 * sensitivity.most_noise(floor) / found.max())
        return found * more[0]

    monkeypatch.setattr(nncf_int8, "_insert_pairs", insert)
    monkeypatch.setattr(sensitivity.Judge, "noise", noise)
    effect = quantize(form, recorded, tmp_path / "out", bias_correction="fast", budget={"min_snr_db": floor})
    assert len(inserted) == 3
    assert inserted[1] < inserted[2]
    assert min(effect["snr_db"].values()) >= floor
    told = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert told["chosen"] == effect["snr_db"]
    assert told["left_out"] == effect["left_out"]
    assert effect["quantized"] == len(LAYERS) - len(effect["left_out"])
    assert worst_db(tmp_path / "out", recorded) >= floor - 0.5


@pytest.mark.parametrize(
    "params", [{"smooth_quant": True}, {"bias_correction": "accurate"}, {"model_type": "any"}], ids=str
)
def test_other_ways_of_fitting_give_working_int8(form, recorded, tmp_path, params):
    effect = quantize(form, recorded, tmp_path / "out", **params)
    assert effect["quantized"] == len(LAYERS)
    assert worst_db(tmp_path / "out", recorded) > 10


def test_sums_in_int8_are_groups_like_any_other(form, recorded, tmp_path):
    plain = quantize(form, recorded, tmp_path / "all", model_type="any", sensitivity=True)
    told = json.loads((tmp_path / "all" / "sensitivity.json").read_text())
    assert sum(row["operators"] for row in told["groups"]) > len(LAYERS), "sums are counted"
    floor = min(plain["snr_db"].values()) + 1
    mixed = quantize(form, recorded, tmp_path / "mixed", model_type="any", budget={"min_snr_db": floor})
    assert len(mixed["left_out"]) == 1
    pairs = [kinds(tmp_path / name).count("QuantizeLinear") for name in ("all", "mixed")]
    assert pairs[0] - 4 <= pairs[1] < pairs[0], "those of the sums of other layers stay"


def test_a_float_layer_beside_an_int8_one_is_not_counted(form, recorded, tmp_path):
    """Two layers read one quantized activation; the weights of one are in float."""
    import onnx_ir as ir

    from sdcompile.passes import qdq

    quantize(form, recorded, tmp_path / "out")
    model = qdq.load(tmp_path / "out" / "model.onnx")
    first = qdq.targets(model.graph)[0]
    weight = ir.Value(
        name="float", const_value=ir.tensor(np.ones((WIDTH, WIDTH), "f"), name="float"),
        type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((WIDTH, WIDTH)),
    )  # fmt: skip
    model.graph.initializers.add(weight)
    other = ir.Node("", "MatMul", [first.inputs[0], weight], name="other", num_outputs=1)
    model.graph.insert_after(first, other)
    assert qdq.check(model, symmetric=False)["operators"] == len(LAYERS)
