"""ONNX Runtime: the provider that was asked for, or an error in words; never another one in silence."""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import ValidationError

from sdcompile import machine
from sdcompile.backends import Host, onnxruntime
from sdcompile.backends import onnxruntime_tensorrt as trt
from sdcompile.backends.base import read_card
from sdcompile.backends.onnxruntime_binding import Bindings
from sdcompile.backends.trt import driver
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


def test_a_bound_session_gives_the_same_arrays(forms, tmp_path):
    # The CUDA engine's way of calling, exercised on the CPU: no GPU was at hand.
    model = forms("vae_decoder")
    engine = model.engine("onnxruntime", tmp_path)
    plain = engine(model.feeds())["sample"]
    engine._bindings = Bindings(engine._session, ["sample"], "cpu", graphs=True)
    for _ in range(3):
        np.testing.assert_array_equal(engine(model.feeds())["sample"], plain)
    engine.close()


def test_an_engine_of_another_backend_is_refused(forms, tmp_path):
    folder = forms("vae_decoder").build("onnxruntime", tmp_path)
    card = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**card, "backend": "openvino"}))
    with pytest.raises(StageError, match="backend openvino, not of onnxruntime"):
        onnxruntime.open_engine(folder, Host())


# Providers that are only played: no GPU was at hand -----------------------------------------------


def test_either_distribution_is_onnx_runtime(monkeypatch):
    for there in ({"onnxruntime": "1.32.0"}, {"onnxruntime-gpu": "1.32.0"}):
        monkeypatch.setattr(machine, "installed", there.get)
        assert machine.version("onnxruntime") == "1.32.0"
    monkeypatch.setattr(machine, "installed", {}.get)
    assert machine.version("onnxruntime") is None


ADA = driver.Driver((driver.Device("RTX 4090", "sm89", 24 << 30),), "CUDA 13.0")
ALL = {"onnxruntime-gpu": "1.32.0", "tensorrt": "10.14"}


@pytest.mark.parametrize(
    ("there", "found", "devices", "why"),
    [
        (ALL, ADA, ("cpu", "cuda", "tensorrt"), ""),
        ({"onnxruntime-gpu": "1.32.0"}, ADA, ("cpu", "cuda"), "TensorRT is not installed"),
        (ALL, driver.Driver(reason="no NVIDIA driver was found here"), ("cpu",), "no NVIDIA driver was found here"),
        ({"onnxruntime": "1.32.0"}, ADA, ("cpu",), "pip install 'sdcompile[onnxruntime-gpu]'"),
    ],
)
def test_providers_are_those_that_library_and_driver_allow_and_a_plan_says_so(there, found, devices, why, monkeypatch):
    monkeypatch.setattr(onnxruntime, "installed", there.get)
    monkeypatch.setattr(driver, "look", lambda: found)
    probe = onnxruntime.probe()
    assert probe.available
    assert probe.devices == devices
    said = onnxruntime.lacks(probe, "fp16", onnxruntime.Options(provider="tensorrt"))
    assert said == "" if not why else said.startswith("provider tensorrt cannot run here: ")
    assert why in said
    assert onnxruntime.lacks(probe, "fp16", onnxruntime.Options()) == ""


@pytest.mark.parametrize(("architecture", "refused"), [("sm75", True), ("sm86", False)])
def test_turing_cannot_build_for_ampere_and_later(architecture, refused, monkeypatch):
    monkeypatch.setattr(onnxruntime, "installed", ALL.get)
    monkeypatch.setattr(driver, "look", lambda: driver.Driver((driver.Device("GPU", architecture, 1),), "CUDA 13.0"))
    options = onnxruntime.Options(provider="tensorrt", hardware_compatibility="ampere_plus")
    said = onnxruntime.lacks(onnxruntime.probe(), "fp16", options)
    assert said.startswith("hardware_compatibility: ampere_plus can be built on GPUs from Ampere on") is refused
    assert bool(said) is refused


def test_tensorrts_engines_fit_the_gpu_and_the_versions_they_were_built_for(forms, tmp_path, played, monkeypatch):
    monkeypatch.setattr(onnxruntime, "installed", ALL.get)
    monkeypatch.setattr(driver, "look", lambda: ADA)
    model = forms("vae_decoder")
    one = model.build("onnxruntime", tmp_path / "one", "fp16", provider="tensorrt")
    wide = model.build(
        "onnxruntime", tmp_path / "wide", "fp16", provider="tensorrt", hardware_compatibility="ampere_plus"
    )
    assert onnxruntime.fits_here(one) == onnxruntime.fits_here(wide) == ""
    monkeypatch.setattr(driver, "look", lambda: driver.Driver((driver.Device("RTX 3090", "sm86", 1),), "CUDA 13.0"))
    with pytest.raises(HostError, match="architecture is sm86 here, and was sm89"):
        onnxruntime.fits_here(one)
    assert onnxruntime.fits_here(wide) == ""
    monkeypatch.setattr(onnxruntime, "installed", {**ALL, "tensorrt": "11.0"}.get)
    with pytest.raises(HostError, match=r"tensorrt is 11\.0 here, and was 10\.14"):
        onnxruntime.fits_here(wide)


GPU = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture
def played(monkeypatch):
    """A machine whose ONNX Runtime has every provider. Gives what sessions were asked for; `played.loads` says what
    loads, `played.takes` whether TensorRT takes part of the graph."""
    real, asked = ort.InferenceSession, SimpleNamespace(providers=[], loads=GPU, takes=True)

    class Session:
        def __init__(self, path, settings, providers):
            asked.providers.append(providers)
            self._real = real(path, settings, providers=["CPUExecutionProvider"])
            told = dict(p for p in providers if not isinstance(p, str))
            if asked.takes and (cache := told.get(GPU[0], {}).get("trt_engine_cache_path")):
                (Path(cache) / "TensorrtExecutionProvider_graph_0_0_sm89.engine").write_bytes(b"engine")

        def get_providers(self):
            return asked.loads

        def __getattr__(self, name):
            return getattr(self._real, name)

    monkeypatch.setattr(ort, "get_available_providers", lambda: GPU)
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    # torch, when it is first imported, asks for the module's spec.
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__spec__=ModuleSpec("tensorrt", None)))
    return asked


def test_tensorrt_is_asked_for_first_with_one_profile_and_its_engines_stay_beside_the_onnx(forms, tmp_path, played):
    made = {"builder_optimization_level": 4, "workspace_mib": 512, "hardware_compatibility": "ampere_plus"}
    folder = forms("vae_decoder").build("onnxruntime", tmp_path, "fp16", provider="tensorrt", **made)
    (first, told), (second, cuda), third = played.providers[-1]
    assert [first, second, third] == GPU
    assert cuda["use_tf32"] == "0"
    assert told == {
        "trt_profile_min_shapes": "latent_sample:1x4x8x8", "trt_profile_opt_shapes": "latent_sample:1x4x16x16",
        "trt_profile_max_shapes": "latent_sample:2x4x24x24", "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder / "engines"), "trt_builder_optimization_level": "4",
        "trt_max_workspace_size": str(512 << 20), "trt_engine_hw_compatible": "1",
    }, "and no precision flag, which would let TensorRT choose types of its own"  # fmt: skip
    assert [path.suffix for path in (folder / "engines").iterdir()] == [".engine"]
    engine = onnxruntime.open_engine(folder, Host())
    assert (engine.facts["provider"], engine.facts["precision"]) == (GPU[0], "fp16")
    engine.close()


@pytest.mark.parametrize("loads", [GPU[1:], GPU[2:]])
def test_tensorrt_that_falls_back_in_silence_is_a_host_error_that_says_what_it_needs(loads, forms, tmp_path, played):
    played.loads = loads
    with pytest.raises(HostError, match=f"TensorrtExecutionProvider was asked for, .* fell back to {loads[0]}") as told:
        forms("vae_decoder").build("onnxruntime", tmp_path, provider="tensorrt")
    for part in ("nvidia-smi", "TensorRT", "provider: cuda"):
        assert part in told.value.hint


def test_tensorrt_that_takes_no_part_of_the_graph_is_refused(forms, tmp_path, played):
    played.takes = False
    with pytest.raises(StageError, match="took no part of the graph"):
        forms("vae_decoder").build("onnxruntime", tmp_path, provider="tensorrt")


def test_missing_tensorrt_libraries_are_named(forms, tmp_path, played, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(HostError, match="TensorRT is not installed") as told:
        forms("vae_decoder").build("onnxruntime", tmp_path, provider="tensorrt")
    assert "pip install 'sdcompile[tensorrt]'" in told.value.hint


def test_opening_an_engine_writes_nothing_into_its_folder_whatever_the_provider_does(forms, tmp_path, played):
    folder = forms("vae_decoder").build("onnxruntime", tmp_path / "made", "fp16", provider="tensorrt")
    (engine,) = (folder / "engines").iterdir()
    engine.write_bytes(b"as it was built")
    engine.chmod(0o444)
    (tmp_path / "store").hardlink_to(engine)
    before = sorted(folder.rglob("*"))
    for cache in (None, tmp_path / "cache"):
        opened = onnxruntime.open_engine(folder, Host(cache=cache))
        told = played.providers[-1][0][1]
        there = Path(told["trt_engine_cache_path"])
        assert not [name for name in told if "timing" in name]
        assert (there / engine.name).read_bytes() == b"engine", "the provider wrote, into a copy"
        assert folder not in there.parents
        assert cache in (None, there.parent)
        opened.close()
        assert not there.exists()
        assert sorted(folder.rglob("*")) == before
        assert (tmp_path / "store").read_bytes() == b"as it was built"


def test_timings_are_kept_beside_the_store_for_one_gpu_and_version_or_not_at_all(tmp_path):
    options = onnxruntime.Options(provider="tensorrt")
    here = {"gpu": "RTX 4090", "architecture": "sm89", "driver": "CUDA 13.0", "tensorrt": "10.14"}
    other = {**here, "tensorrt": "11.0"}
    first, second = (trt.timings_in(tmp_path, options, identity) for identity in (here, other))
    assert first is not None
    assert second is not None
    assert first != second
    assert first.is_relative_to(tmp_path)
    assert trt.timings_in(None, options, here) is None
    assert trt.timings_in(tmp_path, options.model_copy(update={"timing_cache": False}), here) is None


def test_tensorrts_options_are_for_tensorrt():
    with pytest.raises(ValidationError, match="workspace_mib is for provider tensorrt, and provider is cuda"):
        onnxruntime.Options(provider="cuda", workspace_mib=512)


def test_cuda_graphs_are_asked_for_where_they_are_wanted_and_are_for_cuda(forms, tmp_path, played, monkeypatch):
    model, played.loads = forms("vae_decoder"), GPU[1:]
    for name, build in (("with", {"cuda_graphs": True}), ("without", {"cuda_graphs": False}), ("unsaid", {})):
        model.build("onnxruntime", tmp_path / name, provider="cuda", **build)
        told = dict(provider for provider in played.providers[-1] if not isinstance(provider, str))
        assert told[GPU[1]].get("enable_cuda_graph") == ("1" if name == "with" else None)
    with pytest.raises(ValidationError, match="cuda_graphs is for provider cuda, and provider is tensorrt"):
        onnxruntime.Options(provider="tensorrt", cuda_graphs=True)

    def refusing(*_, **__):
        raise RuntimeError("This session cannot use the graph capture feature as requested by the user")

    monkeypatch.setattr(ort, "InferenceSession", refusing)
    with pytest.raises(StageError, match="cannot use the graph capture feature") as told:
        model.build("onnxruntime", tmp_path / "refused", provider="cuda", cuda_graphs=True)
    assert "cuda_graphs: false" in told.value.hint


def test_tensorrts_graph_has_no_operator_of_onnx_runtimes_own_and_int8_is_refused():
    assert onnxruntime.export(onnxruntime.Options(provider="tensorrt")) == {}
    assert onnxruntime.export(onnxruntime.Options(provider="cuda")) == {"attention": "mha"}
    assert "symmetric" in onnxruntime.refuses("int8", onnxruntime.Options(provider="tensorrt"))[0]
    assert onnxruntime.refuses("int8", onnxruntime.Options(provider="cuda")) == []
    assert onnxruntime.refuses("fp16", onnxruntime.Options(provider="tensorrt")) == []


def test_graphs_of_large_weights_are_run_without_a_block_for_all_activations(tmp_path):
    from sdcompile.backends.onnxruntime_settings import settings_of

    (tmp_path / "model.onnx").write_bytes(b"x")
    assert settings_of(tmp_path / "model.onnx", "ORT_ENABLE_ALL", None).enable_mem_pattern
    with (tmp_path / "model.onnx.data").open("wb") as file:
        file.truncate(500_000_000)
    assert not settings_of(tmp_path / "model.onnx", "ORT_ENABLE_ALL", None).enable_mem_pattern


def test_sessions_are_set_up_as_the_recipe_and_the_host_say(tmp_path):
    import onnxruntime as ort

    from sdcompile.backends.onnxruntime_settings import settings_of

    (tmp_path / "model.onnx").write_bytes(b"x")
    settings = settings_of(tmp_path / "model.onnx", "ORT_ENABLE_BASIC", 3, profile_to=tmp_path / "p")
    assert settings.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert settings.intra_op_num_threads == 3
    assert (settings.enable_profiling, settings.profile_file_prefix) == (True, str(tmp_path / "p"))
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == "0"
