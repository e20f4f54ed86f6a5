"""ONNX fp32 -> int8, put there as QuantizeLinear / DequantizeLinear pairs by NNCF's post-training quantization.

Ranges are fitted to what the fp32 reference was fed on real denoising trajectories. With a budget,
groups of layers are left in float so that held out samples keep the SNR asked for (see `sensitivity`). Weights
are folded to integers at the end, tensor by tensor, so that a large model's fp32 weights are in memory only while
NNCF works on them.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdcompile.errors import StageError
from sdcompile.passes import nncf_manners, patterns
from sdcompile.passes.base import Pass, by_modules, write_effect
from sdcompile.spec import Job

if TYPE_CHECKING:
    import onnx

    from sdcompile.passes.sensitivity import Judge
    from sdcompile.samples import Samples

REVISION = 9

SENSITIVITY = "sensitivity.json"


class Budget(BaseModel):
    """What quantization may cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_snr_db: float = Field(
        ge=0, le=120, description="Lowest SNR of any held out sample, in dB. Groups that cost most stay in float."
    )


Mode = Literal["static", "weights", "dynamic"]


class Params(BaseModel):
    """INT8 post-training quantization by NNCF, and narrow weights (see `weights`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode = Field(
        default="static",
        description="static: weights and activations, with ranges fitted to samples. weights: weights alone, "
        "symmetric per channel; less to store and to read, computed in float. dynamic: weights and activations of "
        "linear layers, with ranges taken from each call.",
    )
    bits: Literal[8, 4] = Field(
        default=8, description="With `mode: weights`: bits of the weights of linear layers; what cannot have 4 gets 8."
    )
    group_size: Annotated[int, Field(ge=16, le=1024)] | None = Field(
        default=None, description="With `bits: 4`: inputs that share one scale, a power of two. Unset = 64."
    )
    symmetric: bool = Field(
        default=False,
        description="int8 activations, and 4-bit weights, with zero point 0 only, which is all that TensorRT takes.",
    )
    model_type: Literal["transformer", "any"] = Field(
        default="transformer",
        description="transformer: only convolutions and products are quantized; any: all NNCF can.",
    )
    attention_products: bool = Field(
        default=True,
        description="Quantize also the two products inside an attention. Unset = only for onnxruntime: OpenVINO and "
        "TensorRT compute an attention in one kernel where they are float.",
    )
    vectors: bool = Field(
        default=False,
        description="Quantize also layers that see one vector an image (time embeddings): too small to gain by it.",
    )
    smooth_quant: bool = Field(
        default=False,
        description="Move outliers of activations into weights before products (SmoothQuant); a multiplication each.",
    )
    smooth_quant_alpha: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="With `smooth_quant`: how much of them is moved. Unset = 0.95."
    )
    bias_correction: Literal["off", "fast", "accurate"] = Field(
        default="off", description="Shift biases so that the mean output stays; fast or layer by layer."
    )
    max_samples: int = Field(default=96, ge=1, description="Samples that ranges are fitted to.")
    ignore: tuple[str, ...] = Field(
        default=(),
        description="Modules to leave in float, by path: `mid_block`, `**.attn2.to_q`; `*` is any part of one name, "
        "`**` any names. A pattern that matches nothing is an error.",
    )
    float_groups: tuple[str, ...] = Field(
        default=(),
        description="Groups of layers to leave in float, by the names that `sdcompile sensitivity` gives them: just "
        "these, not what lies under them. A build adds those that `accept_if` finds slower in int8.",
    )
    budget: Budget | None = Field(default=None, description="What it may cost. Unset: everything is quantized.")
    sensitivity: bool = Field(
        default=False,
        description="Measure every group of layers, without a budget too; else a budget looks into blocks of them only "
        "where it must.",
    )
    judge_samples: int = Field(
        default=12, ge=1, description="Held out samples that groups and the result are judged by."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Params:
        if self.bits == 4 and self.mode != "weights":
            raise ValueError("bits: 4 is for `mode: weights`; activations are quantized to 8 bits")
        if self.group_size is not None and self.bits != 4:
            raise ValueError("group_size is for `bits: 4`; 8 bits have one scale per output channel")
        if self.group_size is not None and self.group_size & (self.group_size - 1):
            raise ValueError(f"group_size {self.group_size} is no power of two, which engines ask for")
        if self.mode == "dynamic" and (self.budget is not None or self.sensitivity):
            raise ValueError("budget and sensitivity are for `mode: static` and `mode: weights`; dynamic has neither")
        fitted = {
            "smooth_quant: true": self.smooth_quant, f"bias_correction: {self.bias_correction}":
            self.bias_correction != "off", f"model_type: {self.model_type}": self.model_type != "transformer",
        }  # fmt: skip
        for told, asked in fitted.items():
            if asked and self.mode != "static":
                raise ValueError(f"{told} is for `mode: static`, which fits ranges of activations; this is {self.mode}")
        if self.smooth_quant_alpha is not None and not self.smooth_quant:
            raise ValueError(f"smooth_quant_alpha: {self.smooth_quant_alpha:g} is for `smooth_quant: true`")
        if self.symmetric and self.model_type == "any":
            raise ValueError(
                "symmetric: true (TensorRT's default) is for `model_type: transformer`; with `any` NNCF takes uint8 "
                "for activations that are never negative"
            )
        if self.symmetric and self.mode == "dynamic":
            raise ValueError(
                "symmetric: true (TensorRT's default) is not for `mode: dynamic`, whose activations are uint8 with a "
                "zero point for each call"
            )
        return self

    @property
    def alpha(self) -> float:
        """SmoothQuant's, in NNCF's terms: -1 = off."""
        if not self.smooth_quant:
            return -1.0
        return 0.95 if self.smooth_quant_alpha is None else self.smooth_quant_alpha

    @property
    def groups_of(self) -> int | None:
        """Inputs that share a scale where weights have 4 bits; None = 8 bits."""
        return (self.group_size or 64) if self.bits == 4 else None


def refuses(params: Params, modules: Mapping[str, str]) -> list[str]:
    from sdcompile.passes import qdq

    paths = [path for path, kind in modules.items() if kind in ("conv", "linear")]
    faults = []
    for number, pattern in enumerate(params.ignore):
        if fault := patterns.fault_of(paths, [pattern], qdq.QUANTIZABLE):
            faults.append(f"ignore.{number}: {fault}")
    groups = {qdq.group_of(path) for path in paths}
    for number, name in enumerate(params.float_groups):
        if name not in groups:
            some = ", ".join(sorted(groups)[:3])
            faults.append(f"float_groups.{number}: {name!r} is no group of layers; they are named as {some}, ...")
    if params.ignore and patterns.named(paths, params.ignore) == set(paths):
        faults.append("ignore: this leaves no layer to quantize; build the component in another precision")
    return faults


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Write the int8 form of `inputs["onnx"]/model.onnx` to `out/model.onnx` (+ model.onnx.data) and effect.json.

    inputs["samples"]: the samples form of a calibration. With a budget, or `sensitivity`, sensitivity.json tells
    what each group costs, or with a budget alone blocks of them where that was enough. Raises StageError when the
    graph is quantized already, a pattern matches nothing, no sample was recorded, one holds NaN, the budget cannot be
    held, or the result is not what was asked.
    """
    import onnx_ir as ir

    from sdcompile.passes import qdq, sensitivity
    from sdcompile.samples import Samples

    params = Params.model_validate({k: v for k, v in job.params.items() if k in Params.model_fields})
    source = inputs["onnx"] / "model.onnx"
    original = qdq.load(source)
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear", "MatMulInteger") for node in original.graph):
        raise StageError(f"{job.component}: the graph is quantized already", "name the original weights as source")
    layers = qdq.targets(original.graph)
    ignored = qdq.matching(layers, params.ignore, loose=job.params.get("inherited", False))
    ignored |= {str(node.name) for node in layers if qdq.group_of(qdq.module_of(node)) in params.float_groups}
    if not params.vectors:
        # The exporter writes Gemm for linear layers on (rows, width) alone. On the tiny model, quantizing the time
        # embedding was most of the noise (SNR 12.3 dB in verification; 21.5 dB without these layers).
        ignored |= {str(node.name) for node in qdq.targets(original.graph) if node.op_type == "Gemm"}
    # Which tokens are alike is a comparison of near equals: rounded, it merges others than were meant.
    ignored |= {str(n.name) for n in qdq.targets(original.graph) if qdq.module_of(n).endswith(".token_merge")}
    if not params.attention_products:
        ignored |= qdq.inside_attentions(original.graph)
    held_out = Samples(inputs["samples"], job.component, held_out=True)
    with tempfile.TemporaryDirectory(dir=out, prefix="quantize-") as scratch:
        graph = Path(scratch) / "model.onnx"
        _insert_pairs(inputs, graph, job, params, ignored)
        judge = sensitivity.judge(held_out, params.judge_samples, graph, source)
        job.say("measuring int8", None)
        everything = chosen = judge.noise(None)
        groups = qdq.groups(qdq.load(graph).graph)
        left_out: list[str] = []
        if params.budget is not None or params.sensitivity:
            parts = sensitivity.measure(judge, groups, job.say, blocks=not params.sensitivity)
            if params.budget is not None:
                floor_db = params.budget.min_snr_db
                left_out, chosen = sensitivity.choose(parts, everything, floor_db, job.say)
                if left_out and params.bias_correction != "off":
                    gone = {name for group in left_out for name in groups[group]}
                    more, chosen = _corrected_again(inputs, graph, job, params, ignored | gone, judge, floor_db)
                    left_out += more
            told = sensitivity.report(parts, groups, everything, left_out, chosen)
            (out / SENSITIVITY).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        model = qdq.load(graph)
        if left_out and params.bias_correction == "off":
            qdq.keep_only(model, set(groups) - set(left_out))
        qdq.fold_weights(model)
        found = qdq.check(model, symmetric=params.symmetric)
        job.say("writing model.onnx", None)
        ir.save(model, out / "model.onnx", external_data="model.onnx.data")
    write_effect(
        out,
        parameters=(parameters := _parameters(original), parameters),
        size_bytes=(_bytes(inputs["onnx"]), _bytes(out)),
        snr_db=sensitivity.snr_by_region(chosen, judge.regions),
        quantized=found["operators"],
        bits4=found["bits4"],
        operators=len(qdq.targets(original.graph)),
        left_out=left_out,
        ignored=list(params.ignore),
    )


def _corrected_again(
    inputs: Mapping[str, Path], graph: Path, job: Job, params: Params, ignored: Collection[str],
    judge: Judge, floor_db: float,
) -> tuple[list[str], Any]:  # fmt: skip
    """Insert the pairs again without `ignored`, for biases were shifted for a neighbourhood that had them.

    What is left then may miss the floor, and more must go: returns these groups, and the noise that remains.
    """
    from sdcompile.passes import qdq, sensitivity

    more: list[str] = []
    while True:
        _insert_pairs(inputs, graph, job, params, ignored)
        judge = judge.again()
        noise = judge.noise(None)
        if noise.max() <= sensitivity.most_noise(floor_db):
            return more, noise
        groups = qdq.groups(qdq.load(graph).graph)
        parts = sensitivity.measure(judge, groups, job.say, blocks=True)
        found, _ = sensitivity.choose(parts, noise, floor_db, job.say)
        more += found
        before, ignored = ignored, {*ignored, *(name for group in found for name in groups[group])}
        if len(ignored) == len(before):
            raise StageError(
                f"the budget of {floor_db:g} dB cannot be held with corrected biases: without {', '.join(more)} the "
                f"SNR is {-10 * math.log10(noise.max()):.1f} dB",
                "lower `quantize: {budget: {min_snr_db: ...}}`, or leave out `bias_correction`",
            )


def _insert_pairs(inputs: Mapping[str, Path], target: Path, job: Job, params: Params, ignored: Collection[str]) -> None:
    """Write the graph with a pair on every input that runs in int8, weights still in float, beside its data."""
    import onnx_ir as ir

    from sdcompile.passes import casting, weights
    from sdcompile.samples import Samples

    source = inputs["onnx"] / "model.onnx"
    if params.mode == "weights":
        weights.insert_pairs(source, target, ignored, params.groups_of, params.symmetric)
        return
    if params.mode == "dynamic":
        weights.quantize_at_run_time(source, target, ignored)
        return
    fit = Samples(inputs["samples"], job.component, held_out=False)
    if not len(fit):
        raise StageError(
            f"{job.component}: no sample was recorded to fit ranges to",
            "raise `calibrate: {images: ..., max_samples: ...}`",
        )
    with _unshared(source, target.parent, always=params.smooth_quant) as readable:
        model = ir.from_proto(_quantized(readable, fit, job, params, ignored))
        casting.map_weights(model, readable.parent)
        for old in target.parent.glob(f"{target.name}*"):
            old.unlink()  # that of biases corrected before, or there would be room for both
        ir.save(model, target, external_data="model.onnx.data")


@contextmanager
def _unshared(source: Path, scratch: Path, *, always: bool) -> Iterator[Path]:
    """`source`, or a copy of it for as long as it is read: onnx (1.23) refuses weight files of several hard links,
    and hard links are how the store shares them with engines. `always` where something is written beside it."""
    files = sorted(source.parent.glob(f"{source.name}*"))
    if not always and all(path.stat().st_nlink == 1 for path in files):
        yield source
        return
    with tempfile.TemporaryDirectory(dir=scratch, prefix="unshared-") as folder:
        for path in files:
            shutil.copyfile(path, Path(folder) / path.name)
        yield Path(folder) / source.name


def _quantized(source: Path, fit: Samples, job: Job, params: Params, ignored: Collection[str]) -> onnx.ModelProto:
    import onnx

    with nncf_manners.quiet(), nncf_manners.lean():
        import nncf
        from nncf.onnx.quantization.backend_parameters import BackendParameters
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters

        advanced = AdvancedQuantizationParameters(
            disable_bias_correction=params.bias_correction == "off",
            smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=params.alpha, convolution=-1),
            backend_params={
                BackendParameters.EXTERNAL_DATA_DIR: str(source.parent.resolve()),
                BackendParameters.COMPRESS_WEIGHTS: False,
            },
        )
        names = list(fit.rows)
        count = min(params.max_samples, len(names))
        job.say(f"fitting int8 ranges to {count} samples", None)
        model = onnx.load(source, load_external_data=False)
        rows = list(_rows(model, fit, [names[i * len(names) // count] for i in range(count)]))
        try:
            return nncf.quantize(
                model,
                nncf.Dataset(rows, lambda row: {name: array[row[1]] for name, array in fit[row[0]].feeds.items()}),
                subset_size=len(rows),
                # NNCF 3.4 makes every zero point 0 for a transformer with the performance preset only; with
                # another model type it takes uint8 for activations that are never negative.
                preset=nncf.QuantizationPreset.PERFORMANCE if params.symmetric else nncf.QuantizationPreset.MIXED,
                model_type=nncf.ModelType.TRANSFORMER if params.model_type == "transformer" else None,
                fast_bias_correction=params.bias_correction != "accurate",
                ignored_scope=nncf.IgnoredScope(names=sorted(ignored)) if ignored else None,
                advanced_parameters=advanced,
            )
        except (nncf.ValidationError, nncf.InternalError, nncf.UnsupportedModelError) as error:
            raise StageError(f"{job.component}: NNCF cannot quantize this graph: {error}") from error


def _rows(model: onnx.ModelProto, fit: Samples, names: list[str]) -> Iterator[tuple[str, slice]]:
    """(sample, rows of it) for every call that ranges are fitted to."""
    from sdcompile.passes import calculator

    inputs = [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input]
    for name in names:
        shapes = [shape for key, shape in fit.shapes(name).items() if key.startswith("in.")]
        yield from ((name, rows) for rows in calculator.parts(shapes, inputs))


def _parameters(model: Any) -> int:
    values = model.graph.initializers.values()
    return sum(int(value.const_value.size) for value in values if value.const_value.dtype.is_floating_point())


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model.onnx*"))


PASS = Pass(
    name="nncf_int8",
    stage="quantize",
    kind="onnx",
    revision=REVISION,
    params=Params,
    run=run,
    refuses=by_modules(refuses),
    packages=("nncf", "onnx", "onnxruntime"),
    calibrates=lambda params: True,
    # Measured on SD 1.5, a UNet of 3.2 GiB, which stays mapped: 6.1 GiB, with SmoothQuant too.
    memory=(1.8, 0.8),
    # The graph with pairs, its weights still fp32, and these rounded, beside the result; and where the store shares the
    # source's file, a copy of it for as long as it is read (which meets the others where biases are corrected again).
    # SmoothQuant writes anew what it changes.
    disk=lambda params, setting: 4.0 if params.smooth_quant else 3.0,
)
