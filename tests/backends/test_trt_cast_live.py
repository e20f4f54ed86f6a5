"""Casts as TensorRT-RTX itself takes them: bf16 engines, nodes kept in float32, and options it builds without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdcompile.backends import tensorrt_rtx
from sdcompile.errors import StageError
from sdcompile.passes import PASSES
from sdcompile.spec import Job
from tests.backends.conftest import CONFIGS, FAMILY

pytestmark = pytest.mark.tiny
pytest.importorskip("tensorrt_rtx", reason="needs pip install 'sdcompile[tensorrt-rtx]'")


def built(model, source: Path, folder: Path, precision: str, cast=(), **options) -> dict:
    """The layer table of the portable engine of `source`, cast to `precision`."""
    typed, out = folder / "typed", folder / "out"
    typed.mkdir()
    out.mkdir()
    job = model.job(precision, **options)
    told = Job(job.component, {**job.params, **dict(cast)}, precision, job.spec, job.shapes)
    PASSES[f"cast_{precision}"].run({"onnx": source}, typed, told)
    tensorrt_rtx.build(typed, out, job)
    return json.loads((out / "layers.json").read_text())["engines"]["portable"]


def test_a_bf16_engine_computes_in_bf16_where_the_opset_lets_it(forms, tmp_path):
    from sdcompile.steps import export_onnx

    model, source = forms("vae_decoder"), tmp_path / "opset22"
    source.mkdir()
    params = {"family": "sd", "opset": 22, "attention": "sdpa", "multiples": FAMILY.facts(CONFIGS)["multiples"]}
    job = Job(model.component, params, spec=model.spec, shapes=model.shapes)
    export_onnx.run({"checkpoint": model.checkpoint}, source, job)
    table = built(model, source, tmp_path, "bf16")
    assert {kind.split()[1] for kind in table["summary"]["computing"]} == {"BFloat16"}


def test_a_convolution_that_an_older_opset_leaves_in_float32_is_found_out(forms, tmp_path):
    model = forms("vae_decoder")
    with pytest.raises(StageError, match="not so: no matrix product or convolution in float32"):
        built(model, model.export("sdpa", ""), tmp_path, "bf16")


def test_nodes_kept_in_float32_are_float32_in_the_engine_and_no_fault(forms, tmp_path):
    model = forms("unet")
    keep = {"keep_fp32": ("conv_in", "Softmax")}
    table = built(model, model.export("sdpa", ""), tmp_path, "fp16", keep)
    (kept,) = (row for row in table["layers"] if "unet.conv_in/Conv_0" in row["onnx"])
    assert [tensor["type"] for tensor in kept["inputs"]] == ["Float"]
    claims = {row["claim"]: row["found"] for row in table["claims"]}
    assert claims["every attention of several heads, 16 to 256 wide, is one kernel"] == "0 of 0", "kept on purpose"


def test_weights_may_be_streamed_and_workspace_bounded_where_there_is_no_gpu(forms, tmp_path):
    model = forms("vae_decoder")
    built(model, model.export("sdpa", ""), tmp_path, "fp16", weight_streaming=True, workspace_mib=256)
