"""ONNX Runtime: the provider that was asked for, or an error in words; never another one in silence."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from sdcompile.backends import Host, onnxruntime
from sdcompile.backends.base import read_card
from sdcompile.errors import HostError, StageError

pytestmark = pytest.mark.tiny
ort = pytest.importorskip("onnxruntime")


def test_the_fused_attention_operator_is_what_runs(forms):
    import onnx

    model = forms("unet")
    fused = onnx.load(model.source("onnxruntime") / "model.onnx", load_external_data=False)
    plain = onnx.load(model.export("sdpa", "") / "model.onnx", load_external_data=False)
    assert Counter(node.op_type for node in fused.graph.node)["MultiHeadAttention"] == 8
    assert not Counter(node.op_type for node in plain.graph.node)["MultiHeadAttention"]


def test_weights_stay_one_file_shared_with_the_onnx_they_come_from(forms, tmp_path):
    model = forms("unet")
    folder = model.build("onnxruntime", tmp_path)
    assert {path.name for path in folder.iterdir()} == {"engine.json", "model.onnx", "model.onnx.data"}
    source = model.source("onnxruntime") / "model.onnx.data"
    assert (folder / "model.onnx.data").samefile(source)


def test_a_provider_that_is_not_compiled_in_is_a_host_error(forms, tmp_path, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(HostError, match="has no CUDAExecutionProvider") as missing:
        forms("vae_decoder").build("onnxruntime", tmp_path, provider="cuda")
    assert "onnxruntime-gpu" in missing.value.hint


def test_a_provider_that_falls_back_to_the_cpu_is_a_host_error(forms, tmp_path, monkeypatch):
    real = ort.InferenceSession

    def falling_back(path, settings, providers):
        return real(path, settings, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", falling_back)
    with pytest.raises(HostError, match="fell back to CPUExecutionProvider"):
        forms("vae_decoder").build("onnxruntime", tmp_path, provider="cuda")


def test_a_missing_library_is_a_host_error(forms, tmp_path, monkeypatch):
    folder = forms("vae_decoder").build("onnxruntime", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(HostError, match="backend onnxruntime cannot run here"):
        onnxruntime.open_engine(folder, Host())


def test_a_graph_onnx_runtime_does_not_take_is_a_stage_error(forms, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nothing of the kind")
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match=r"ONNX Runtime refuses model\.onnx"):
        onnxruntime.build(tmp_path, tmp_path / "out", forms("unet").job())


def test_facts_say_that_the_cpu_computes_fp16_models_in_fp32(forms, tmp_path):
    engine = forms("vae_decoder").engine("onnxruntime", tmp_path, "fp16")
    assert engine.facts["asked"] == "fp16"
    assert engine.facts["precision"] in ("fp32", "mixed")
    assert engine.facts["provider"] == "CPUExecutionProvider"
    assert engine.facts["threads"] == 1


@pytest.mark.parametrize("level", ["all", "extended", "basic", "disable"])
def test_every_optimization_level_gives_the_same_picture(level, forms, tmp_path):
    model = forms("vae_decoder")
    plain = model.engine("onnxruntime", tmp_path / "plain", graph_optimization="disable")
    other = model.engine("onnxruntime", tmp_path / level, graph_optimization=level)
    np.testing.assert_allclose(other(model.feeds())["sample"], plain(model.feeds())["sample"], rtol=1e-3, atol=1e-5)
    assert read_card(tmp_path / level, "onnxruntime").options == {"graph_optimization": level}


def test_a_session_with_bound_outputs_gives_the_same_arrays(forms, tmp_path):
    # The CUDA engine's way of calling, exercised on the CPU: no GPU was at hand.
    model = forms("vae_decoder")
    engine = model.engine("onnxruntime", tmp_path)
    plain = engine(model.feeds())["sample"]
    engine._device = "cuda"
    np.testing.assert_array_equal(engine(model.feeds())["sample"], plain)


def test_an_engine_of_another_backend_is_refused(forms, tmp_path):
    folder = forms("vae_decoder").build("onnxruntime", tmp_path)
    card = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**card, "backend": "openvino"}))
    with pytest.raises(StageError, match="backend openvino, not of onnxruntime"):
        onnxruntime.open_engine(folder, Host())
