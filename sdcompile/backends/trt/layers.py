"""The compiler's own table of what it made: layers, their types, and the claims an engine has to bear out.

TensorRT-RTX prints the table at the end of a build (`ProfilingVerbosity.DETAILED`, verbose log);
TensorRT gives it as JSON through its engine inspector. Both become the same rows here. It is all
that can be known of an engine where no GPU runs it. What a table does not tell is unproven: it stops no build,
and is no proof.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sdcompile.backends.trt.graph import Promise

_ROW = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: \[(?P<inputs>.*)\], Constants: \[(?P<constants>.*)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>[^,]*),(?: \w+: \w*,)* Metadata: ?(?P<metadata>.*)"
)
_TENSOR = re.compile(r"Name: ([^,]*), Dimensions: \[([^\]]*)\],.*?Datatype: (\w+)")
_IO = re.compile(r"^ ?Name: ([^,]*), IOMode: (\w+), DataType: (\w+), Dimensions: \[[^\]]*\].*", re.MULTILINE)
_BOUNDS = re.compile(r"(Min|Opt|Max)Shape: \[([^\]]*)\]")
_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_MEMORY = {"weights": "Total Weights Memory", "activations": "Total Activation Memory", "scratch": "Max Scratch Memory"}

_CONVOLUTION = re.compile(r"conv(?!er)|correlation", re.IGNORECASE)
"""Types of layers that convolve: correlation, deconv (Myelin's), CaskConvolution, CaskGemmConvolution, CaskJitConv,
CaskDeconvolutionV2, ConvActPool and more."""
_GEMM = re.compile(r"gemm|matrix_?multiply|fully_?connected", re.IGNORECASE)
_FUSIONS = ("kgen", "fusion", "runtime_fusion")
_GEMM_FUSION = re.compile(r"^__myl_(?:\w*)Fc")
_PRODUCT_TACTIC = re.compile(r"_xmma_gemm|\d+gemm_|_sgemm_", re.IGNORECASE)
_CONVOLUTION_TACTIC = re.compile(r"_xmma_fprop|_xmma_dgrad|cudnn_", re.IGNORECASE)

_TYPES = (
    ("BFloat16", re.compile("BFLOAT16|BF16")), ("UInt8", re.compile("UINT8")), ("Int8", re.compile("INT8")),
    ("Int4", re.compile("INT4")), ("FP8", re.compile("FP8|E4M3|E5M2")), ("Half", re.compile("FP16|HALF|FLOAT16")),
    ("Float", re.compile("FP32|FLOAT")),
)  # fmt: skip
"""Type -> how TensorRT's tables write it, in the order in which they are looked for: a word ("Half"), or a sentence
("Channel major FP16 format where channel % 8 == 0")."""
_COMPUTING = frozenset({"BFloat16", "Int8", "FP8", "Half", "Float"})
_XMMA = re.compile(r"_(?:(?:t?f32|bf16|f16|i8|e4m3|e5m2|i32){2})_(t?f32|bf16|f16|i8|e4m3|e5m2)(?:f32|f16|bf16|i32)_")
"""A kernel's name tells in its second word what it multiplies, and what it adds up in: i8i8_i8i32_f32."""
_XMMA_TYPES = {
    "f32": "Float", "tf32": "Float", "f16": "Half", "bf16": "BFloat16", "i8": "Int8", "e4m3": "FP8", "e5m2": "FP8",
}  # fmt: skip
_OLDER_TACTICS = (
    ("BFloat16", re.compile(r"_bf16_s\d+")), ("Half", re.compile(r"_fp16_s\d+|_h\d+(?:gemm|cudnn)|_hgemm|_hcudnn")),
    ("Int8", re.compile(r"_int8_i\d+|_i\d+(?:gemm|cudnn)|_imma")), ("Float", re.compile("_sgemm|_scudnn")),
)  # fmt: skip
UNKNOWN = "unknown"
"""What a product or convolution computes in, where its table does not tell."""
_INT8_SHARE = 0.9
"""Of the products and convolutions quantised in the graph, how many must run in int8. The rest is
room for what a compiler folds into another layer and no longer names."""


class Claim(NamedTuple):
    """Something an engine of its precision has to be, what was found, and whether it holds; None = it is unproven,
    as the table does not tell."""

    claim: str
    found: str
    holds: bool | None


def parse(table: str, log: str) -> dict[str, Any]:
    """The table message ("Layers:" and what follows) and the rest of the log -> the content of layers.json, one engine.

    Raises ValueError when a line of the table is not understood, as a half-read table proves nothing.
    """
    body, _, tensors = table.partition("I/O Tensors:")
    rows = []
    for line in filter(None, map(str.strip, body.splitlines()[1:])):
        found = _ROW.fullmatch(line)
        if found is None:
            raise ValueError(f"a layer of the compiler's table is not understood: {line[:200]}")
        rows.append(
            _row(
                found["name"], found["type"], _tensors(found["inputs"]), _tensors(found["outputs"]),
                _tensors(found["constants"]), found["tactic"].strip(), _ORIGIN.findall(found["metadata"]),
            )
        )  # fmt: skip
    if not rows:
        raise ValueError("the compiler's table holds no layer")
    return {"summary": _summary(rows, log), "io": [_binding(m) for m in _IO.finditer(tensors)], "layers": rows}


def parse_inspector(text: str, log: str) -> dict[str, Any]:
    """The engine inspector's JSON (TensorRT 10, 11) -> the same content. Raises ValueError as `parse` does.

    Where the shapes of a layer are dynamic, TensorRT 10 tells no types of tensors ("N/A due to dynamic shapes"): then
    its kernel's name says what it computes in, or the type of its weights.
    """
    data = json.loads(text)
    layers = data.get("Layers") or []
    if not layers or not all(isinstance(layer, Mapping) and "Name" in layer for layer in layers):
        raise ValueError("the engine inspector names no layers: was it built with detailed profiling verbosity?")
    rows = [
        _row(
            layer["Name"], layer.get("LayerType", ""), _json_tensors(layer.get("Inputs") or ()),
            _json_tensors(layer.get("Outputs") or ()), _json_tensors(layer.get("Constants") or ()),
            layer.get("TacticName") or "", _origins(layer), _inspected_type(layer),
        )
        for layer in layers
    ]  # fmt: skip
    # From TensorRT 11 on; before it, Bindings are names alone.
    io = [_json_binding(tensor) for tensor in data.get("I/O Tensors") or ()]
    return {"summary": _summary(rows, log), "io": io, "layers": rows, "inspected": True}


def claims(table: Mapping[str, Any], promise: Promise, precision: str, *, fused_attention: bool) -> list[Claim]:
    """What an engine of `precision` made of a graph that promises `promise` has to be, each with what was found.

    fp32 engines claim nothing. A float32 product or convolution is allowed where all its ONNX nodes
    were kept in float32 by a pass. A claim is unproven where types are unknown, and where no layer is known for a
    product. TensorRT's own tables (`parse_inspector`) refute only what they show otherwise, and never that an
    attention is one kernel: which it fuses was tried of TensorRT-RTX alone (`graph.FUSED_WIDTHS`).
    """
    made: list[Claim] = []
    if precision == "fp32":
        return made
    rows, inspected = table["layers"], bool(table.get("inspected"))
    made.append(_float32_claim(rows, promise))
    if fused_attention:
        fused = {name for row in rows if row["kind"] == "attention" for name in row["onnx"]} & promise.attentions
        whole = fused == promise.attentions
        made.append(
            Claim(
                "every attention of several heads, 16 to 256 wide, is one kernel",
                f"{len(fused)} of {len(promise.attentions)}"
                + ("; which of them TensorRT fuses is not known" if inspected and not whole else ""),
                whole or (None if inspected else False),
            )
        )  # fmt: skip
    if precision == "int8":
        made.append(_int8_claim(rows, promise, inspected))
    return made


def claims_again(data: Mapping[str, Any], precision: str, *, fused_attention: bool) -> dict[str, list[Claim]]:
    """Target -> the claims of its engine, from the content of layers.json; those that were stored where what they
    were held against was not."""
    if "promise" not in data:
        return {target: [Claim(**row) for row in table["claims"]] for target, table in data["engines"].items()}
    promise = Promise(**{name: frozenset(nodes) for name, nodes in data["promise"].items()})
    return {
        target: claims(table, promise, precision, fused_attention=fused_attention)
        for target, table in data["engines"].items()
    }


def _float32_claim(rows: Sequence[Mapping[str, Any]], promise: Promise) -> Claim:
    computing = [row for row in rows if row["kind"] in ("gemm", "conv")]
    wide = [row for row in computing if row["computes"] == "Float"]
    stray = [row for row in wide if not row["onnx"] or not set(row["onnx"]) <= promise.kept]
    unknown = [row for row in computing if row["computes"] == UNKNOWN]
    named = ", ".join((row["onnx"] or [row["name"]])[0] for row in (stray or unknown)[:3])
    return Claim(
        "no matrix product or convolution in float32, but for nodes kept so on purpose",
        f"{len(stray)} of {len(computing)}"
        + (f", and {len(unknown)} of unknown type" if unknown else "") + (f": {named}" if named else ""),
        False if stray else None if unknown or not computing else True,
    )  # fmt: skip


def _int8_claim(rows: Sequence[Mapping[str, Any]], promise: Promise, inspected: bool) -> Claim:
    def named(*types: str) -> frozenset[str]:
        return promise.quantized & {name for row in rows if row["computes"] in types for name in row["onnx"]}

    reached, unknown = named("Int8"), named(UNKNOWN)
    if inspected:
        # Seen in no layer that computes: folded into one that does not name them, or not told.
        unknown |= promise.quantized - named(*_COMPUTING)
    unknown -= reached
    asked = len(promise.quantized)
    enough = _INT8_SHARE * asked
    return Claim(
        f"at least {_INT8_SHARE:.0%} of what is quantised in the graph computes in int8",
        f"{len(reached)} of {asked}" + (f", and {len(unknown)} of unknown type" if unknown else ""),
        False if not asked or len(reached | unknown) < enough else True if len(reached) >= enough else None,
    )  # fmt: skip


def _row(
    name: str, kind: str, inputs: Sequence[Any], outputs: Sequence[Any], constants: Sequence[Any], tactic: str,
    origins: Sequence[str], computes: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    kind = _kind(name, kind, tactic)
    told = computes or (inputs[0]["type"] if inputs else None)
    return {
        "name": name,
        "kind": kind,
        "computes": told if kind in ("gemm", "conv", "attention") else None,
        "inputs": list(inputs),
        "outputs": list(outputs),
        "constants": list(constants),
        "tactic": tactic,
        "onnx": list(dict.fromkeys(origins)),
    }


def _kind(name: str, kind: str, tactic: str) -> str:
    """gemm, conv, attention, or the compiler's own word."""
    if "_mha" in tactic or "fmha" in tactic or "_mha" in name:
        return "attention"
    if _CONVOLUTION.search(kind):
        return "conv"
    if _GEMM.search(kind):
        return "gemm"
    if kind in _FUSIONS:
        if _GEMM_FUSION.match(name) or _PRODUCT_TACTIC.search(tactic):
            return "gemm"
        if _CONVOLUTION_TACTIC.search(tactic):
            return "conv"
    return kind


def _origins(layer: Mapping[str, Any]) -> list[str]:
    """The ONNX nodes of a layer: of its metadata, else what its name is put together of ("Conv_1 + Relu_2",
    "MatMul_3_myl0_4")."""
    told = _ORIGIN.findall(layer.get("Metadata") or "")
    return told or [re.sub(r"_myl\d+_\d+$", "", part) for part in re.split(r" \+ | \|\| ", layer["Name"])]


def _inspected_type(layer: Mapping[str, Any]) -> str:
    tensors = [_type(tensor) for tensor in layer.get("Inputs") or () if isinstance(tensor, Mapping)]
    weights = [_type({"Datatype": layer[key].get("Type")}) for key in ("Weights", "ConvWeights") if key in layer]
    # The kernel before the weights, which may be narrower than what is computed in.
    told = [*tensors[:1], _tactic_type(layer.get("TacticName") or ""), *weights, *tensors[1:]]
    return next((kind for kind in told if kind in _COMPUTING), UNKNOWN)


def _tactic_type(tactic: str) -> str:
    if found := _XMMA.search(tactic):
        return _XMMA_TYPES[found[1]]
    return next((kind for kind, words in _OLDER_TACTICS if words.search(tactic)), UNKNOWN)


def _summary(rows: Sequence[Mapping[str, Any]], log: str) -> dict[str, Any]:
    computing = Counter(f"{row['kind']} {row['computes']}" for row in rows if row["computes"])
    return {
        "layers": len(rows),
        "computing": dict(sorted(computing.items())),
        "other": dict(sorted(Counter(row["kind"] for row in rows if not row["computes"]).items())),
        **{f"{name}_bytes": _bytes(log, words) for name, words in _MEMORY.items()},
    }


def _bytes(log: str, words: str) -> int | None:
    found = re.findall(rf"{words}: (\d+) bytes", log)
    return max(map(int, found)) if found else None


def _tensors(text: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": [int(side) for side in sides.split(",") if side], "type": kind}
        for name, sides, kind in _TENSOR.findall(text)
    ]


def _json_tensors(tensors: Iterable[Any]) -> list[dict[str, Any]]:
    return [
        {"name": t.get("Name", ""), "shape": list(t.get("Dimensions", ())), "type": _type(t)}
        for t in tensors
        if isinstance(t, Mapping)
    ]


def _type(tensor: Mapping[str, Any]) -> str:
    """The word TensorRT-RTX uses, from a field of its own (TensorRT 11) or TensorRT 10's "Format/Datatype"; integers
    that are not computed in keep the word they have."""
    told = str(next(filter(None, map(tensor.get, ("Datatype", "DataType", "Format/Datatype"))), UNKNOWN))
    if told.startswith("N/A"):
        return UNKNOWN
    return next((kind for kind, words in _TYPES if words.search(told.upper())), told)


def _json_binding(tensor: Mapping[str, Any]) -> dict[str, Any]:
    profiles = tensor.get("ProfileInfo") or [{}]
    bounds = {side.lower(): list(profiles[0][f"{side}Shape"]) for side in ("Min", "Opt", "Max")
              if f"{side}Shape" in profiles[0]}  # fmt: skip
    mode = str(tensor.get("IOMode", "")).lower()
    return {"name": tensor.get("Name", ""), "mode": mode, "type": _type(tensor), "profile": bounds or None}


def _binding(found: re.Match[str]) -> dict[str, Any]:
    bounds = {side.lower(): [int(n) for n in sides.split(",") if n] for side, sides in _BOUNDS.findall(found[0])}
    return {"name": found[1], "mode": found[2].lower(), "type": found[3], "profile": bounds or None}
