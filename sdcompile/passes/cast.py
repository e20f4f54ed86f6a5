"""fp16 and bf16 on the ONNX, and which nodes stay in float32: those that are named, and those found to overflow.

What overflows is measured: calibration samples are run through the fp32 graph, and where a value leaves
fp16's range both the node that makes it and those that read it are kept, as a value between them would be
infinite. effect.json names every node kept, and why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from sdcompile.errors import StageError
from sdcompile.passes import casting, patterns
from sdcompile.passes.base import Pass, write_effect
from sdcompile.passes.casting import LIMIT, Half
from sdcompile.spec import Job

if TYPE_CHECKING:
    import onnx_ir as ir

REVISION = 2

_OP = re.compile(r"[A-Z][A-Za-z0-9]*")

_NAMED = 200
"""Nodes that effect.json names; their number is told in full."""


class Params(BaseModel):
    """What `cast:` of a component may say; the words for each field are `recipe.compression.CastRecipe`'s."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_fp32: tuple[str, ...] = ()
    from_samples: bool = False
    headroom: float = Field(default=2.0, ge=1)
    max_samples: int = Field(default=32, ge=1)


def run(inputs: Mapping[str, Path], out: Path, job: Job, half: Half) -> None:
    """Write the form of `inputs["onnx"]/model.onnx` in `half` to `out/model.onnx` (+ model.onnx.data), and effect.json.

    inputs["samples"], with from_samples: the samples form of a calibration. Raises StageError when a pattern of
    keep_fp32 matches nothing, no sample was recorded, or a weight does not fit fp16 (largest value 65504).
    """
    import onnx
    import onnx_ir as ir

    params = Params.model_validate({k: v for k, v in job.params.items() if k in Params.model_fields})
    model = ir.load(inputs["onnx"] / "model.onnx")
    casting.map_weights(model, inputs["onnx"])
    casting.prepare(model)
    keep = named(list(model.graph), params.keep_fp32, loose=job.params.get("inherited", False))
    told: dict[str, Any] = {"operators": len(model.graph)}
    if params.from_samples:
        found, measured = _overflowing(model.graph, inputs, out, job, params)
        keep = {**found, **keep}
        told["ranges"] = measured
    told["kept"] = [
        {"node": node.name, "op": node.op_type, "why": keep[str(node.name)]}
        for node in model.graph
        if str(node.name) in keep
    ]
    told.update(kept_count=len(told["kept"]), kept=told["kept"][:_NAMED], type=half.word)
    parameters = _parameters(model)
    job.say(f"casting to {half.word}", None)
    casting.cast(model, half, keep)
    job.say("writing model.onnx", None)
    ir.save(model, out / "model.onnx", external_data="model.onnx.data")
    onnx.checker.check_model(out / "model.onnx")
    write_effect(out, (parameters, parameters), (_bytes(inputs["onnx"]), _bytes(out)), **told)


def named(nodes: list[ir.Node], wanted: tuple[str, ...], *, loose: bool = False) -> dict[str, str]:
    """Name of each node that one of `wanted` names -> why it is kept.

    A pattern is an operator ("Softmax"), a node's name if it holds a "/" ("decoder.conv_out/Conv_0", "*"
    matching anything), or the path of a module (see `patterns`). Raises StageError when one
    matches nothing, unless `loose`.
    """
    from sdcompile.passes import qdq

    kept: dict[str, str] = {}
    for pattern in wanted:
        if "/" in pattern:
            found = {str(node.name) for node in nodes if fnmatchcase(str(node.name), pattern)}
        elif _OP.fullmatch(pattern):
            found = {str(node.name) for node in nodes if node.op_type == pattern}
        else:
            found = {str(node.name) for node in nodes if patterns.covered([qdq.module_of(node)], pattern)}
        if not found and not loose:
            ops = ", ".join(sorted({node.op_type for node in nodes})[:12])
            modules = ", ".join(sorted({qdq.group_of(qdq.module_of(node)) for node in nodes} - {""})[:6])
            raise StageError(
                f"the pattern {pattern!r} of cast.keep_fp32 matches no node",
                f"operators here are {ops}, ...; modules {modules}, ...",
            )
        kept |= dict.fromkeys(found, f"named by {pattern!r}")
    return kept


def _overflowing(
    graph: ir.Graph, inputs: Mapping[str, Path], out: Path, job: Job, params: Params
) -> tuple[dict[str, str], dict[str, Any]]:
    """Nodes that make or read a value beyond fp16 on the calibration samples, and what was measured."""
    import onnx_ir as ir

    from sdcompile.passes import magnitudes
    from sdcompile.samples import Samples

    samples = Samples(inputs["samples"], job.component, held_out=False)
    if not len(samples):
        raise StageError(
            f"{job.component}: nothing was recorded that ranges could be measured with",
            "raise `calibrate: {images: ...}` or `max_samples`",
        )
    names = list(samples.rows)
    count = min(len(names), params.max_samples)
    names = [names[i * len(names) // count] for i in range(count)]
    makers = {
        str(value.name): node
        for node in graph
        for value in node.outputs
        if value.dtype == ir.DataType.FLOAT and value.name
    }
    # Constants were lifted out of the graph that is run: what they made is a weight here, judged when it is cast.
    reached = magnitudes.largest(inputs["onnx"], list(makers), samples, names, out, job.say)
    allowed = LIMIT / params.headroom
    beyond = {name: value for name, value in reached.items() if value > allowed}
    kept: dict[str, str] = {}
    for name, value in beyond.items():
        output = next(v for v in makers[name].outputs if v.name == name)
        for use in output.uses():
            kept.setdefault(str(use.node.name), f"reads a value that reaches {value:.3g}")
    kept |= {str(makers[name].name): f"its value reaches {value:.3g}" for name, value in beyond.items()}
    largest = max(reached.items(), key=lambda row: row[1])
    return kept, {
        "samples": count, "values": len(reached), "limit": LIMIT, "headroom": params.headroom, "beyond": len(beyond),
        "largest": {"node": makers[largest[0]].name, "max_abs": float(f"{min(largest[1], 1e38):.4g}")},
    }  # fmt: skip


def _parameters(model: ir.Model) -> int:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return sum(int(tensor.size) for tensor in tensors if tensor is not None and tensor.dtype.is_floating_point())


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model.onnx*"))


def run_fp16(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    run(inputs, out, job, casting.FP16)


def run_bf16(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    run(inputs, out, job, casting.BF16)


_PACKAGES = ("onnx", "onnxscript")

FP16 = Pass(
    name="cast_fp16",
    stage="quantize",
    kind="onnx",
    section="cast",
    revision=REVISION,
    memory=(0.2, 0.5),
    # The graph is run in fp32 besides.
    measuring=(1.6, 2.0),
    params=Params,
    run=run_fp16,
    packages=_PACKAGES,
    calibrates=lambda params: bool(params.from_samples),
)

BF16 = Pass(
    name="cast_bf16",
    stage="quantize",
    kind="onnx",
    section="cast",
    revision=1,
    memory=(0.2, 0.5),
    params=Params,
    run=run_bf16,
    packages=_PACKAGES,
    opset=22,
)
