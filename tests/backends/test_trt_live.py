"""TensorRT-RTX itself, without a GPU: what it takes, what it builds, and what its layer table proves.

Every claim has a sibling that must fail: a graph the parser refuses, a target the table refuses, an
engine whose types are not those it was asked for.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from sdcompile.backends import BACKENDS, tensorrt_rtx
from sdcompile.backends.trt import compiling, layers, targets
from sdcompile.backends.trt.compiling import Order
from sdcompile.backends.trt.graph import promise
from sdcompile.errors import StageError
from sdcompile.spec import ComponentSpec, Job, Range, TensorSpec

pytestmark = pytest.mark.tiny
pytest.importorskip("tensorrt_rtx", reason="needs pip install 'sdcompile[tensorrt-rtx]'")
onnx = pytest.importorskip("onnx")

SPEC = ComponentSpec("unet", (TensorSpec("x", ("B", 8, 32), "float32"),), (TensorSpec("y", ("B", 8, 32), "float32"),))
SHAPES = {"B": Range(1, 2, 4)}


def save(folder: Path, nodes, weights, *, types=("FLOAT", "FLOAT"), shape=("B", 8, 32), opset=21) -> Path:
    """A graph x -> y in `folder`/model.onnx."""
    from onnx import TensorProto, helper

    values = [
        helper.make_tensor_value_info(n, getattr(TensorProto, t), shape) for n, t in zip("xy", types, strict=True)
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    folder.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder


def tensor(name, array, kind=None):
    from onnx import TensorProto, helper, numpy_helper

    if kind is None:
        return numpy_helper.from_array(np.asarray(array), name)
    return helper.make_tensor(name, getattr(TensorProto, kind), np.shape(array), np.ravel(array))


def node(op, inputs, outputs, **attributes):
    from onnx import helper

    return helper.make_node(op, inputs, outputs, name=f"{op}_{outputs[0]}", **attributes)


def typed_product(folder: Path, kind: str) -> Path:
    """One MatMul of (B, 8, 32) by (32, 32) in the type `kind`, float32 outside."""
    from onnx import TensorProto

    weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    half = int(TensorProto.FLOAT16)
    if kind in ("float32", "float16", "bfloat16"):
        to = getattr(TensorProto, {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}[kind])
        nodes = [
            node("Cast", ["x"], ["a"], to=to), node("Cast", ["w"], ["b"], to=to), node("MatMul", ["a", "b"], ["c"]),
            node("Cast", ["c"], ["y"], to=int(TensorProto.FLOAT)),
        ]  # fmt: skip
        return save(folder, nodes, [tensor("w", weight)])
    if kind == "int4":  # weights alone
        weights = [tensor("w", np.clip(weight * 3, -8, 7).astype(np.int8), "INT4")]
        nodes = [
            node("Cast", ["x"], ["h"], to=half), node("DequantizeLinear", ["w", "s"], ["b"], axis=0, block_size=32),
            node("MatMul", ["h", "b"], ["c"]), node("Cast", ["c"], ["y"], to=int(TensorProto.FLOAT)),
        ]  # fmt: skip
        return save(folder, nodes, [*weights, tensor("s", np.full((1, 32), 0.3, np.float16))])
    zero = {"int8": "INT8", "float8e4m3fn": "FLOAT8E4M3FN"}[kind]
    weights = [
        tensor("w", weight.astype(np.float16)), tensor("s", np.float16(0.05)), tensor("z", [0], zero),
    ]  # fmt: skip
    weights[2].dims[:] = []
    nodes = [node("Cast", ["x"], ["h"], to=half), *quantized("h", "a"), *quantized("w", "b"),
             node("MatMul", ["a", "b"], ["c"]), node("Cast", ["c"], ["y"], to=int(TensorProto.FLOAT))]  # fmt: skip
    return save(folder, nodes, weights)


def quantized(value: str, out: str, zero: str = "z"):
    return [
        node("QuantizeLinear", [value, "s", zero], [f"{out}_q"]),
        node("DequantizeLinear", [f"{out}_q", "s", zero], [out]),
    ]


def order(onnx_folder: Path, out: Path, profile, target=None, name="engine") -> Order:
    out.mkdir(parents=True, exist_ok=True)
    return Order(
        "tensorrt_rtx", tensorrt_rtx.VERSION, onnx_folder / "model.onnx", out / f"{name}.plan", out / f"{name}.log",
        out / f"{name}.txt", profile, target,
    )  # fmt: skip


def compiled(folder: Path, out: Path, target: str | None = None, profile=None) -> dict:
    """The layer table of `folder`'s graph built for `target`."""
    given = order(folder, out, profile or SPEC.profile(SHAPES), target)
    compiling.compile_plan(given, lambda *_: None, "test")
    return layers.parse(given.table.read_text(), given.log.read_text())


def job(precision="fp16", **options) -> Job:
    return Job("unet", {"family": "sd", "options": options}, precision, SPEC, SHAPES)


def build(source: Path, out: Path, precision="fp16", **options) -> dict:
    out.mkdir(parents=True)
    tensorrt_rtx.build(source, out, job(precision, **options))
    return json.loads((out / "layers.json").read_text())["engines"]


# --- the parser -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("garbage", "Failed to parse"),
        ("mixed", "must have same input types"),
        ("asymmetric", "zero.?point"),
        ("int16", "initializer"),
    ],
)
def test_what_the_parser_refuses_is_told_in_its_words(fault, said, tmp_path):
    from onnx import TensorProto

    weight = np.ones((32, 32), np.float16)
    if fault == "garbage":
        (tmp_path / "model.onnx").write_bytes(b"nothing of the kind")
    elif fault == "mixed":
        save(tmp_path, [node("MatMul", ["x", "w"], ["y"])], [tensor("w", weight)], opset=20)
    else:
        zero, kind = (3, "INT8") if fault == "asymmetric" else (0, "INT16")
        weights = [tensor("w", weight), tensor("s", np.float16(0.05)), tensor("z", [zero], kind)]
        weights[2].dims[:] = []
        nodes = [node("Cast", ["x"], ["h"], to=int(TensorProto.FLOAT16)), *quantized("h", "a"),
                 node("MatMul", ["a", "w"], ["c"]), node("Cast", ["c"], ["y"], to=int(TensorProto.FLOAT))]  # fmt: skip
        save(tmp_path, nodes, weights)
    with pytest.raises(StageError, match=f"(?is)tensorrt_rtx does not take this graph.*({said})"):
        compiled(tmp_path, tmp_path / "out")


def test_the_network_has_the_names_types_and_shapes_of_the_spec(forms, tmp_path):
    model = forms("unet")
    table = compiled(model.source("tensorrt_rtx", "fp16"), tmp_path, profile=model.spec.profile(model.shapes))
    bound = {row["name"]: row for row in table["io"]}
    profile = model.spec.profile(model.shapes)
    for given in model.spec.inputs:
        assert bound[given.name]["mode"] == "input"
        assert bound[given.name]["type"] == {"float32": "Float", "int64": "Int64"}[given.dtype]
        found = bound[given.name]["profile"]
        assert tuple(tuple(found[side]) for side in ("min", "opt", "max")) == profile[given.name]
    assert bound["out_sample"]["type"] == "Float"


# --- profiles ---------------------------------------------------------------------------------


def test_a_profile_whose_min_is_above_its_opt_is_refused(tmp_path):
    source = typed_product(tmp_path, "float16")
    with pytest.raises(StageError, match="does not take these shapes"):
        compiled(source, tmp_path / "out", profile={"x": ((4, 8, 32), (2, 8, 32), (4, 8, 32))})


def test_a_profile_of_one_shape_makes_an_engine_of_that_shape(tmp_path):
    source = typed_product(tmp_path, "float16")
    (bound,) = [
        io for io in compiled(source, tmp_path / "out", profile={"x": ((2, 8, 32),) * 3})["io"] if io["profile"]
    ]
    assert bound["name"] == "x"
    assert {tuple(shape) for shape in bound["profile"].values()} == {(2, 8, 32)}


def test_a_profile_must_name_the_inputs_of_the_graph(tmp_path):
    source = typed_product(tmp_path, "float16")
    with pytest.raises(StageError, match="the graph has inputs x where its spec says z"):
        compiled(source, tmp_path / "out", profile={"z": ((1, 8, 32),) * 3})


# --- targets ----------------------------------------------------------------------------------

REFUSED = {(row.type, target) for row in targets.LIMITS for target in row.targets}
OLDEST = {
    "float32": "sm80", "float16": "sm75", "bfloat16": "sm80", "int8": "sm80", "int4": "sm80", "float8e4m3fn": "sm89",
}  # fmt: skip
"""Type -> the oldest target that takes it."""


def test_a_type_is_refused_for_every_target_before_the_oldest_that_takes_it():
    before = {(kind, f"sm{n}") for kind, oldest in OLDEST.items() for n in (75, 80, 86) if f"sm{n}" < oldest}
    assert before == REFUSED


@pytest.mark.parametrize(
    ("kind", "target"), sorted(REFUSED | set(OLDEST.items()) | {(kind, "portable") for kind in OLDEST})
)
def test_the_table_of_targets_says_what_the_compiler_says(kind, target, tmp_path):
    source = typed_product(tmp_path, kind)
    capability = None if target == "portable" else target.upper()
    if (kind, target) in REFUSED and kind != "int8":  # int8: not its products but its convolutions fall back there
        with pytest.raises(StageError, match="cannot build"):
            compiled(source, tmp_path / "out", capability)
        return
    rows = compiled(source, tmp_path / "out", capability)["layers"]
    words = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int8": "Int8", "int4": "Half"}
    computing = {row["computes"] for row in rows if row["kind"] == "gemm"}
    assert computing == ({words[kind]} if kind in words else computing)
    assert computing


def test_a_refused_build_does_not_poison_the_next_one(tmp_path):
    wide, half = typed_product(tmp_path / "wide", "float32"), typed_product(tmp_path / "half", "float16")
    with pytest.raises(StageError, match="FP32 GEMM is not supported"):
        compiled(wide, tmp_path / "first", "SM75")
    assert compiled(half, tmp_path / "second", "SM75")["layers"]


# --- engines ----------------------------------------------------------------------------------


def test_one_engine_per_target_each_with_its_table_and_the_same_bytes_in_another_process(tmp_path):
    source = typed_product(tmp_path, "float16")
    engines = build(source, tmp_path / "a", compute_capabilities=["portable", "sm86", "sm120"])
    build(source, tmp_path / "b", compute_capabilities=["portable", "sm86", "sm120"])
    assert list(engines) == ["portable", "sm86", "sm120"]
    digests = {}
    for target in engines:
        first, second = (hashlib.sha256((tmp_path / f / f"{target}.plan").read_bytes()).hexdigest() for f in "ab")
        assert first == second
        digests[target] = first
        assert "[ERROR]" not in (tmp_path / "a" / f"{target}.log").read_text()
    assert len(set(digests.values())) == 3
    card = json.loads((tmp_path / "a" / "engine.json").read_text())
    assert card["measured"]["version"] == tensorrt_rtx.VERSION
    assert card["measured"]["engines"]["sm86"]["bytes"] == (tmp_path / "a" / "sm86.plan").stat().st_size


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_an_fp16_engine_computes_in_fp16_and_fuses_its_attentions(component, forms, tmp_path):
    model = forms(component)
    folder = model.build("tensorrt_rtx", tmp_path, "fp16")
    table = json.loads((folder / "layers.json").read_text())["engines"]["portable"]
    assert table["claims"]
    assert all(claim["holds"] for claim in table["claims"])
    assert not any(name.endswith("Float") for name in table["summary"]["computing"])
    promised = promise(model.source("tensorrt_rtx", "fp16") / "model.onnx")
    # The random UNet's outer heads are 8 wide, which no kernel takes; its inner ones are 16.
    assert len(promised.attentions) == {"text_encoder": 2, "unet": 2, "vae_decoder": 0}[component]
    assert table["summary"]["computing"].get("attention Half", 0) >= len(promised.attentions)


def test_an_fp32_graph_passed_off_as_fp16_is_found_out(forms, tmp_path):
    model = forms("unet")
    with pytest.raises(StageError, match="no matrix product or convolution in float32") as caught:
        tensorrt_rtx.build(model.source("tensorrt_rtx", "fp32"), tmp_path, model.job("fp16"))
    assert "every attention of several heads, 16 to 256 wide, is one kernel (found 0 of 2)" in caught.value.message
    assert not list(tmp_path.glob("*.plan")), "a refused engine must not be left lying about"


def test_fp32_engines_are_built_and_claim_nothing(forms, tmp_path):
    folder = forms("vae_decoder").build("tensorrt_rtx", tmp_path, "fp32")
    assert json.loads((folder / "layers.json").read_text())["engines"]["portable"]["claims"] == []


# --- int8 -------------------------------------------------------------------------------------


def quantized_net(folder: Path, *, products: int = 3) -> Path:
    """Conv, then `products` MatMuls, all with symmetric Q/DQ on both sides, fp16 between them."""
    from onnx import TensorProto

    random = np.random.default_rng(0)
    scale, zero = tensor("s", np.float16(0.03)), tensor("z", [0], "INT8")
    zero.dims[:] = []
    kernel = (0.2 * random.standard_normal((32, 32, 3, 3))).astype(np.float16)
    weights = [scale, zero, tensor("k", kernel), tensor("flat", np.array([0, 0, 32], np.int64)),
               tensor("back", np.array([0, 32, 8, 8], np.int64))]  # fmt: skip
    nodes = [
        node("Cast", ["x"], ["h"], to=int(TensorProto.FLOAT16)), *quantized("h", "c_in"), *quantized("k", "c_w"),
        node("Conv", ["c_in", "c_w"], ["c"], pads=[1, 1, 1, 1]),
        node("Transpose", ["c"], ["t"], perm=[0, 2, 3, 1]),
    ]  # fmt: skip
    value = "t"
    for number in range(products):
        weights.append(tensor(f"w{number}", (0.2 * random.standard_normal((32, 32))).astype(np.float16)))
        nodes += [
            *quantized(value, f"a{number}"), *quantized(f"w{number}", f"b{number}"),
            node("MatMul", [f"a{number}", f"b{number}"], [f"m{number}"]),
            node("Relu", [f"m{number}"], [f"r{number}"]),
        ]  # fmt: skip
        value = f"r{number}"
    nodes += [
        node("Transpose", [value], ["u"], perm=[0, 3, 1, 2]),
        node("Cast", ["u"], ["y"], to=int(TensorProto.FLOAT)),
    ]
    return save(folder, nodes, weights, shape=("B", 32, 8, 8))


IMAGE = ComponentSpec(
    "unet", (TensorSpec("x", ("B", 32, 8, 8), "float32"),), (TensorSpec("y", ("B", 32, 8, 8), "float32"),)
)


@pytest.mark.parametrize("target", ["portable", "sm89"])
def test_a_quantised_graph_becomes_an_int8_engine(target, tmp_path):
    source = quantized_net(tmp_path / "onnx")
    (tmp_path / "out").mkdir()
    given = Job("unet", {"family": "sd", "options": {"compute_capabilities": [target]}}, "int8", IMAGE, SHAPES)
    tensorrt_rtx.build(source, tmp_path / "out", given)
    table = json.loads((tmp_path / "out" / "layers.json").read_text())["engines"][target]
    assert {claim["found"] for claim in table["claims"]} >= {"4 of 4"}
    assert table["summary"]["computing"] == {"conv Int8": 1, "gemm Int8": 3}


def test_int8_convolutions_that_fall_back_on_turing_are_found_out(tmp_path):
    source = quantized_net(tmp_path / "onnx")
    (tmp_path / "out").mkdir()
    given = Job("unet", {"family": "sd", "options": {"compute_capabilities": ["sm75"]}}, "int8", IMAGE, SHAPES)
    with pytest.raises(StageError, match="computes in int8 \\(found 3 of 4\\)"):
        tensorrt_rtx.build(source, tmp_path / "out", given)


def test_int8_with_nothing_quantised_is_refused(tmp_path):
    with pytest.raises(StageError, match="nothing in the graph is quantised"):
        build(typed_product(tmp_path, "float16"), tmp_path / "out", "int8")


def test_half_of_a_quantised_graph_is_not_enough():
    rows = [{"kind": "gemm", "computes": kind, "onnx": [f"m{i}"]} for i, kind in enumerate(["Int8", "Half"])]
    promised = layers.Promise(frozenset(), frozenset({"m0", "m1"}), frozenset())
    share = layers.claims({"layers": rows}, promised, "int8", fused_attention=True)[-1]
    assert (share.found, share.holds) == ("1 of 2", False)


# --- the rest of the table --------------------------------------------------------------------


def test_a_layer_kept_in_float32_on_purpose_is_no_stray():
    rows = [{"kind": "gemm", "computes": "Float", "onnx": ["out"], "name": "g"}]
    for kept, holds in ((frozenset({"out"}), True), (frozenset(), False)):
        found = layers.claims(
            {"layers": rows}, layers.Promise(frozenset(), frozenset(), kept), "fp16", fused_attention=False
        )
        assert [claim.holds for claim in found] == [holds]


def test_a_table_that_is_not_understood_is_an_error_and_no_proof():
    with pytest.raises(ValueError, match="not understood"):
        layers.parse("Layers:\nLayer 1: something new\n", "")
    with pytest.raises(ValueError, match="holds no layer"):
        layers.parse("Layers:\n", "")


def test_progress_is_told_and_grows(tmp_path):
    heard = []
    given = order(typed_product(tmp_path, "float16"), tmp_path / "out", SPEC.profile(SHAPES))
    compiling.compile_plan(given, lambda text, fraction: heard.append((text, fraction)), "test")
    assert "building engine" in {text for text, _ in heard}
    fractions = [fraction for _, fraction in heard]
    assert fractions == sorted(fractions)


def test_what_the_probe_offers_is_the_version_that_was_pinned():
    assert BACKENDS["tensorrt_rtx"].probe().version == tensorrt_rtx.VERSION


def test_an_int8_graph_in_float32_becomes_int8_and_fp16_by_the_cast(tmp_path):
    """What the plan does: the pass that quantises leaves float32 around its pairs, and no types on what it puts in."""
    from sdcompile.passes import PASSES

    quantized_net(tmp_path / "half")
    model = onnx.load(tmp_path / "half" / "model.onnx")
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT16:
            array = onnx.numpy_helper.to_array(weight).astype(np.float32)
            weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    for op in model.graph.node:
        for attribute in op.attribute:
            if attribute.name == "to":
                attribute.i = onnx.TensorProto.FLOAT
    for name in ("wide", "typed", "out"):
        (tmp_path / name).mkdir()
    onnx.save(model, tmp_path / "wide" / "model.onnx")
    given = Job("unet", {"family": "sd", "options": {}, "rest": "fp16"}, "int8", IMAGE, SHAPES)
    PASSES["cast_fp16"].run({"onnx": tmp_path / "wide"}, tmp_path / "typed", given)
    tensorrt_rtx.build(tmp_path / "typed", tmp_path / "out", given)
    table = json.loads((tmp_path / "out" / "layers.json").read_text())["engines"]["portable"]
    assert table["summary"]["computing"] == {"conv Int8": 1, "gemm Int8": 3}
