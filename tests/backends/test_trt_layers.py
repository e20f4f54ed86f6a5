"""Layer tables as TensorRT's engine inspector writes them: what a claim reads in them, and what stays unproven.

The samples are written here in the formats of TensorRT 8.6 and 10 ("Format/Datatype") and 11 ("Datatype").
"""

from __future__ import annotations

import json

import pytest

from sdcompile.backends.trt import layers
from sdcompile.backends.trt.layers import UNKNOWN
from sdcompile.console.pages import layers as page

DYNAMIC = "N/A due to dynamic shapes"
HALF = "Channel major FP16 format where channel % 8 == 0"
WIDE = "Row major linear FP32"
BRAIN = "Row major linear BFloat16 format"
INT8 = "Thirty-two wide channel vectorized row major Int8 format"
FPROP = "sm80_xmma_fprop_implicit_gemm_{}_nhwckrsc_nhwc_tilesize64x64x64_stage3_warpsize2x2x1_g1_tensor16x8x16"


def layer(
    kind: str, told: str, *, onnx: str = "", weights: str = "", tactic: str = "", name: str = "l", key=""
) -> dict:
    """One layer. `key` is the field that tells the types of tensors: TensorRT 10's, unless it is given."""
    tensor = {"Name": "t", "Location": "Device", "Dimensions": [2, 64, 32, 32], key or "Format/Datatype": told}
    made = {"Name": name, "LayerType": kind, "Inputs": [tensor], "Outputs": [tensor], "TacticName": tactic}
    if weights:
        made["Weights"] = {"Type": weights, "Count": 36864}
    return {**made, "Metadata": "\x1f".join(f"[ONNX Layer: {node}]" for node in onnx.split())}


def parsed(*rows: dict, **more) -> dict:
    return layers.parse_inspector(json.dumps({"Layers": rows, "Bindings": ["x", "y"], **more}), "")


def promised(*, attentions="", quantized="", kept="") -> layers.Promise:
    return layers.Promise(*(frozenset(names.split()) for names in (attentions, quantized, kept)))


def verdicts(table: dict, precision: str, promise: layers.Promise, *, fused=False) -> list[bool | None]:
    return [claim.holds for claim in layers.claims(table, promise, precision, fused_attention=fused)]


@pytest.mark.parametrize(
    ("row", "kind", "computes"),
    [
        (layer("CaskConvolution", HALF), "conv", "Half"),
        (layer("CaskGemmConvolution", WIDE), "conv", "Float"),
        (layer("CaskJitConv", HALF), "conv", "Half"),
        (layer("CaskDeconvolutionV2", INT8), "conv", "Int8"),
        (layer("ConvActPool", "Row major Int8 format"), "conv", "Int8"),
        (layer("correlation", "Half"), "conv", "Half"),
        (layer("MatrixMultiply", BRAIN), "gemm", "BFloat16"),
        (layer("gemm", "BFloat16", name="/attn/MatMul_myl0_4"), "gemm", "BFloat16"),
        (layer("gemm", "Float", key="Datatype"), "gemm", "Float"),
        (layer("kgen", "Half", name="__myl_FcAddErfMul_myl0_7"), "gemm", "Half"),
        (layer("fusion", "Int8", tactic="sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x64x64"), "gemm", "Int8"),
        (layer("kgen", "Half", name="_gemm_mha_v2_myl0_3"), "attention", "Half"),
        (layer("kgen", "Float", name="__myl_MulMaxSubExpSum_myl0_2"), "kgen", None),
        (layer("Reformat", WIDE, name="Reformatting CopyNode for Input Tensor 0 to conv"), "Reformat", None),
        # Dynamic shapes: the kernel's name, then the weights' type.
        (layer("CaskConvolution", DYNAMIC, weights="Half"), "conv", "Half"),
        (layer("CaskConvolution", DYNAMIC, tactic=FPROP.format("bf16bf16_bf16f32_f32")), "conv", "BFloat16"),
        (layer("CaskConvolution", DYNAMIC, tactic=FPROP.format("f32f32_tf32f32_f32")), "conv", "Float"),
        (layer("CaskConvolution", DYNAMIC, tactic=FPROP.format("i8f32_i8i32_f32")), "conv", "Int8"),
        (layer("CaskConvolution", DYNAMIC, tactic=FPROP.format("f16f16_f16f32_f32"), weights="Int8"), "conv", "Half"),
        (layer("CaskGemmConvolution", DYNAMIC, tactic="ampere_h16816gemm_256x128_ldg8_nn_v1"), "conv", "Half"),
        (layer("CaskConvolution", DYNAMIC, tactic="ampere_scudnn_128x64_relu_small_nn_v1"), "conv", "Float"),
        (layer("CaskConvolution", DYNAMIC, tactic="sm50_xmma_conv_something_new"), "conv", UNKNOWN),
    ],
)  # fmt: skip
def test_kinds_and_types_are_read_as_tensorrt_writes_them(row, kind, computes):
    (found,) = parsed(row)["layers"]
    assert (found["kind"], found["computes"]) == (kind, computes)


def test_an_engine_all_in_its_precision_is_proven_and_one_convolution_in_float32_is_not():
    good = [layer("CaskConvolution", HALF, onnx="c1 r1"), layer("MatrixMultiply", HALF, onnx="m1")]
    assert verdicts(parsed(*good), "fp16", promised()) == [True]
    bad = layer("CaskConvolution", WIDE, onnx="c2")
    (claim,) = layers.claims(parsed(*good, bad), promised(), "fp16", fused_attention=False)
    assert (claim.found, claim.holds) == ("1 of 3: c2", False)
    assert verdicts(parsed(*good, bad), "fp16", promised(kept="c2")) == [True], "kept so on purpose"


def test_bf16_is_no_float32():
    rows = [layer("CaskConvolution", BRAIN), layer("gemm", "BFloat16"), layer("gemm", "BFloat16", key="Datatype")]
    assert verdicts(parsed(*rows), "bf16", promised()) == [True]
    assert verdicts(parsed(*rows, layer("gemm", "Float")), "bf16", promised()) == [False]


@pytest.mark.parametrize("rows", [[layer("CaskConvolution", DYNAMIC)], [layer("SomethingNew", HALF)]])
def test_types_and_layers_that_are_not_told_are_unproven_neither_refused_nor_a_proof(rows):
    table = parsed(*rows)
    assert verdicts(table, "fp16", promised()) == [None]
    bad = layer("CaskConvolution", WIDE)
    assert verdicts(parsed(*rows, bad), "fp16", promised()) == [False], "what is told still counts"


def test_int8_is_proven_by_layers_in_int8_refuted_by_others_and_else_unproven():
    names = [f"c{i}" for i in range(10)]
    promise = promised(quantized=" ".join(names))

    def made(count: int, *others: dict) -> list[bool | None]:
        rows = [layer("CaskConvolution", INT8, onnx=name) for name in names[:count]]
        return verdicts(parsed(*rows, *others), "int8", promise)[1:]

    assert made(9) == [True]
    assert made(8, layer("CaskConvolution", DYNAMIC, onnx="c8")) == [None]
    assert made(8, layer("CaskConvolution", HALF, onnx="c8")) == [None], "c9 is named nowhere"
    assert made(8, *(layer("CaskConvolution", HALF, onnx=name) for name in names[8:])) == [False]
    assert made(0, layer("NoOp", DYNAMIC)) == [None]
    by_name = [layer("CaskConvolution", INT8, name=f"{name}.weight + Quantize_1 + {name}") for name in names]
    assert verdicts(parsed(*by_name), "int8", promise)[1:] == [True], "without metadata, nodes are in the name"


def test_an_attention_in_several_kernels_is_unproven_as_nobody_tried_which_tensorrt_fuses():
    one = layer("kgen", "Half", name="_gemm_mha_v2_myl0_3", onnx="qk softmax1 av")
    several = [layer("gemm", "Half", onnx="qk2"), layer("kgen", "Half", name="__myl_MaxSubExp", onnx="softmax2")]
    promise = promised(attentions="softmax1 softmax2")
    table = parsed(one, *several)
    assert verdicts(table, "fp16", promise, fused=True) == [True, None]
    assert verdicts({**table, "inspected": False}, "fp16", promise, fused=True) == [True, False], "TensorRT-RTX was"
    assert verdicts(parsed(one, several[0]), "fp16", promised(attentions="softmax1"), fused=True) == [True, True]


def test_the_page_says_unproven():
    table = parsed(layer("CaskConvolution", DYNAMIC, onnx="c1"))
    claims = [claim._asdict() for claim in layers.claims(table, promised(), "fp16", fused_attention=False)]
    told = [str(line) for line in page({"components": {"unet": {"sm89": {**table, "claims": claims}}}})]
    assert "unproven  no matrix product or convolution in float32" in told[-1]
    assert "0 of 1, and 1 of unknown type: c1" in told[-1]


def test_tensorrt_11_tells_inputs_and_outputs_with_their_profile():
    bounds = {"MinShape": [1, 4], "OptShape": [2, 4], "MaxShape": [4, 4], "Format": "Row major linear FP32 (kLINEAR)"}
    tensor = {"Name": "x", "IOMode": "Input", "DataType": "Float", "Dimensions": [-1, 4], "ProfileInfo": [bounds]}
    table = parsed(layer("gemm", "Half", key="Datatype"), **{"I/O Tensors": [tensor]})
    profile = {"min": [1, 4], "opt": [2, 4], "max": [4, 4]}
    assert table["io"] == [{"name": "x", "mode": "input", "type": "Float", "profile": profile}]


@pytest.mark.parametrize("text", ['{"Layers": ["conv + relu"]}', '{"Layers": []}', "{}", "no JSON", '{"Layers": [{}]}'])
def test_a_table_without_details_is_an_error_and_no_proof(text):
    with pytest.raises(ValueError, match=r"names no layers|Expecting value"):
        layers.parse_inspector(text, "")
