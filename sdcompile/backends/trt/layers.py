"""The compiler's own table of what it made: layers, their types, and the claims an engine has to bear out.

TensorRT-RTX prints the table at the end of a build (`ProfilingVerbosity.DETAILED`, verbose log);
TensorRT gives it as JSON through its engine inspector. Both become the same rows here. It is all
that can be known of an engine where no GPU runs it.
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

_CONVOLUTIONS = ("correlation", "convolution", "conv", "deconvolution")
_GEMM_FUSION = re.compile(r"^__myl_(?:\w*)Fc")
_INT8_SHARE = 0.9
"""Of the products and convolutions quantised in the graph, how many must run in int8. The rest is
room for what a compiler folds into another layer and no longer names."""


class Claim(NamedTuple):
    """Something an engine of its precision has to be, what was found, and whether it holds."""

    claim: str
    found: str
    holds: bool


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
    """The engine inspector's JSON (TensorRT 10, 11) -> the same content. Raises ValueError as `parse` does."""
    data = json.loads(text)
    layers = data.get("Layers") or []
    if not layers or not all(isinstance(layer, Mapping) for layer in layers):
        raise ValueError("the engine inspector names no layers: was it built with detailed profiling verbosity?")
    rows = [
        _row(
            layer["Name"], layer.get("LayerType", ""), _json_tensors(layer.get("Inputs", ())),
            _json_tensors(layer.get("Outputs", ())), _json_tensors(layer.get("Constants", ())),
            layer.get("TacticName", ""), _ORIGIN.findall(layer.get("Metadata", "").replace("\x1e", "")),
        )
        for layer in layers
    ]  # fmt: skip
    return {"summary": _summary(rows, log), "io": [], "layers": rows}


def claims(table: Mapping[str, Any], promise: Promise, precision: str, *, fused_attention: bool) -> list[Claim]:
    """What an engine of `precision` made of a graph that promises `promise` has to be, each with what was found.

    fp32 engines claim nothing. A float32 product or convolution is allowed where all its ONNX nodes
    were kept in float32 by a pass.
    """
    made: list[Claim] = []
    if precision == "fp32":
        return made
    rows = table["layers"]
    wide = [row for row in rows if row["kind"] in ("gemm", "conv") and row["computes"] == "Float"]
    stray = [row for row in wide if not row["onnx"] or not set(row["onnx"]) <= promise.kept]
    named = ", ".join((row["onnx"] or [row["name"]])[0] for row in stray[:3])
    made.append(
        Claim(
            "no matrix product or convolution in float32, but for nodes kept so on purpose",
            f"{len(stray)} of {_count(rows)}" + (f": {named}" if stray else ""), not stray,
        )
    )  # fmt: skip
    if fused_attention:
        fused = {name for row in rows if row["kind"] == "attention" for name in row["onnx"]} & promise.attentions
        made.append(
            Claim(
                "every attention of several heads, 16 to 256 wide, is one kernel",
                f"{len(fused)} of {len(promise.attentions)}", fused == promise.attentions,
            )
        )  # fmt: skip
    if precision == "int8":
        made.append(_int8_claim(rows, promise))
    return made


def _int8_claim(rows: Sequence[Mapping[str, Any]], promise: Promise) -> Claim:
    reached = {name for row in rows if row["computes"] == "Int8" for name in row["onnx"]} & promise.quantized
    asked = len(promise.quantized)
    return Claim(
        f"at least {_INT8_SHARE:.0%} of what is quantised in the graph computes in int8",
        f"{len(reached)} of {asked}", asked > 0 and len(reached) >= _INT8_SHARE * asked,
    )  # fmt: skip


def _row(
    name: str, kind: str, inputs: Sequence[Any], outputs: Sequence[Any], constants: Sequence[Any], tactic: str,
    origins: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    kind = _kind(name, kind, tactic)
    return {
        "name": name,
        "kind": kind,
        "computes": inputs[0]["type"] if inputs and kind in ("gemm", "conv", "attention") else None,
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
    if kind.lower() in _CONVOLUTIONS:
        return "conv"
    if kind.lower() in ("gemm", "matrix_multiply") or (kind == "runtime_fusion" and _GEMM_FUSION.match(name)):
        return "gemm"
    return kind


def _summary(rows: Sequence[Mapping[str, Any]], log: str) -> dict[str, Any]:
    computing = Counter(f"{row['kind']} {row['computes']}" for row in rows if row["computes"])
    return {
        "layers": len(rows),
        "computing": dict(sorted(computing.items())),
        "other": dict(sorted(Counter(row["kind"] for row in rows if not row["computes"]).items())),
        **{f"{name}_bytes": _bytes(log, words) for name, words in _MEMORY.items()},
    }


def _count(rows: Iterable[Mapping[str, Any]]) -> int:
    return sum(row["kind"] in ("gemm", "conv") for row in rows)


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
    """The word TensorRT-RTX uses, from its own field or from TensorRT 10's "Format/Datatype" sentence."""
    if "Datatype" in tensor:
        return str(tensor["Datatype"])
    told = str(tensor.get("Format/Datatype", ""))
    words = {"INT8": "Int8", "FP16": "Half", "HALF": "Half", "BF16": "BFloat16", "FP32": "Float", "FLOAT": "Float"}
    return next((word for key, word in words.items() if key in told.upper()), told)


def _binding(found: re.Match[str]) -> dict[str, Any]:
    bounds = {side.lower(): [int(n) for n in sides.split(",") if n] for side, sides in _BOUNDS.findall(found[0])}
    return {"name": found[1], "mode": found[2].lower(), "type": found[3], "profile": bounds or None}
