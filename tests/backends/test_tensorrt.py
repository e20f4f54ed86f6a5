"""The TensorRT backend where TensorRT cannot be: its options, its orders, and the names it may use."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

import sdcompile.backends.tensorrt as backend
from sdcompile.backends import Probe, tensorrt_rtx
from sdcompile.backends.trt import driver
from sdcompile.errors import HostError
from sdcompile.spec import ComponentSpec, Job, Range, TensorSpec

ROOM = Path(backend.__file__).parent
SOURCES = [ROOM / "tensorrt.py", ROOM / "tensorrt_rtx.py", *sorted((ROOM / "trt").glob("*.py"))]

REMOVED = {
    # BuilderFlag and creation flags
    "FP16", "BF16", "INT8", "FP8", "INT4", "FP4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS",
    "REJECT_EMPTY_ALGORITHMS", "WEIGHTLESS", "EXPLICIT_BATCH",
    # calibration and algorithm selection
    "IInt8Calibrator", "IInt8EntropyCalibrator", "IInt8EntropyCalibrator2", "IInt8LegacyCalibrator",
    "IInt8MinMaxCalibrator", "CalibrationAlgoType", "QuantizationFlag", "int8_calibrator", "set_calibration_profile",
    "get_calibration_profile", "set_quantization_flag", "clear_quantization_flag", "get_quantization_flag",
    "quantization_flags", "algorithm_selector", "IAlgorithmSelector",
    # types by hand
    "set_output_type", "reset_output_type", "reset_precision", "precision_is_set", "output_type_is_set",
    "compute_precision", "dynamic_range", "set_dynamic_range", "reset_dynamic_range", "platform_has_fast_fp16",
    "platform_has_fast_int8", "platform_has_tf32",
    # engines, contexts, parser
    "device_memory_size", "get_device_memory_size_for_profile", "create_execution_context_without_device_memory",
    "has_implicit_batch_dimension", "weight_streaming_budget", "minimum_weight_streaming_budget",
    "all_shape_inputs_specified", "supports_model", "parse_with_weight_descriptors", "IStreamReader",
    "get_plugin_creator", "plugin_creator_list",
}  # fmt: skip
"""Names that TensorRT 11 no longer has (compared with 10.16 binding by binding)."""

SPEC = ComponentSpec("unet", (TensorSpec("x", ("B", 8, 32), "float32"),), (TensorSpec("y", ("B", 8, 32), "float32"),))
JOB = Job("unet", {"family": "sd", "options": {}}, "fp16", SPEC, {"B": Range(1, 2, 4)})
GPU = {"gpu": "RTX 4090", "architecture": "sm89", "driver": "CUDA 13.0"}


def test_no_name_that_tensorrt_11_removed_is_used():
    assert used_names("engine.has_implicit_batch_dimension and config.set_flag(trt.BuilderFlag.FP16)") & REMOVED == {
        "has_implicit_batch_dimension", "FP16",
    }  # fmt: skip
    for path in SOURCES:
        assert not used_names(path.read_text(encoding="utf-8")) & REMOVED, path.name
    for flags in (
        backend.Options(version_compatible=True, weight_streaming=True),
        backend.Options(refit=True, strip_plan=True),
    ):
        assert not set(backend.order(flags, JOB, Path("m"), "11.4", GPU).flags) & REMOVED


def used_names(source: str) -> set[str]:
    return {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}


@pytest.mark.tiny
def test_every_name_asked_of_the_module_is_in_tensorrt_rtx_which_has_the_same_api():
    trt = pytest.importorskip("tensorrt_rtx", reason="needs pip install 'sdcompile[tensorrt-rtx]'")
    asked = {
        node.attr
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trt"
    }
    assert {"Builder", "Runtime", "OnnxParser", "IStreamWriter", "Refitter"} <= asked
    assert {name for name in asked if not hasattr(trt, name)} == set()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strip_plan": True}, "strip_plan needs refit: true"),
        ({"version_compatible": True, "refit": True}, "lean runtime, which cannot refit"),
        ({"builder_optimization_level": 6}, "less than or equal to 5"),
        ({"hardware_compatibility": "turing_plus"}, "ampere_plus"),
        ({"workspace_mib": 0}, "greater than or equal to 1"),
        ({"timing_cache": "somewhere"}, "bundle"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        backend.Options(**options)


def test_options_become_flags_and_settings_and_nothing_is_set_unasked():
    plain = backend.order(backend.Options(), JOB, Path("m"), "11.4.0", {})
    assert (plain.flags, plain.settings, plain.workspace) == ((), {"builder_optimization_level": 3}, None)
    asked = backend.order(
        backend.Options(refit=True, strip_plan=True, weight_streaming=True, workspace_mib=2,
                        hardware_compatibility="ampere_plus"),
        JOB, Path("m"), "11.4.0", GPU,
    )  # fmt: skip
    assert asked.flags == ("WEIGHT_STREAMING", "REFIT_IDENTICAL", "STRIP_PLAN")
    assert asked.settings["hardware_compatibility_level"] == "HardwareCompatibilityLevel.AMPERE_PLUS"
    assert asked.workspace == 2 << 20
    assert asked.profile == {"x": ((1, 8, 32), (2, 8, 32), (4, 8, 32))}


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, {"REQUIRE_USER_ALLOCATION"}),
        ({"cuda_graphs": False}, set()),
        # TensorRT-RTX refuses the two together.
        ({"weight_streaming": True}, {"WEIGHT_STREAMING"}),
    ],
)
def test_an_rtx_engine_is_fit_for_cuda_graphs_unless_it_is_to_have_none(options, flags, monkeypatch):
    orders = {}
    monkeypatch.setattr(tensorrt_rtx, "build_engines", lambda name, src, out, job, given, **_: orders.update(given))
    monkeypatch.setattr(tensorrt_rtx, "probe", lambda: Probe(True, version=tensorrt_rtx.VERSION))
    tensorrt_rtx.build(Path("a"), Path("b"), replace(JOB, params={"family": "sd", "options": options}))
    assert {name for order in orders.values() for name in order.flags} == flags


@pytest.mark.parametrize(
    ("architecture", "precision", "options", "why"),
    [
        ("sm75", "bf16", {}, r"bf16 can be built on GPUs from Ampere on; .* \(build it in fp16, or on a newer GPU\)"),
        ("sm75", "fp16", {"hardware_compatibility": "ampere_plus"}, "hardware_compatibility: ampere_plus can be built"),
        ("sm75", "bf16", {"hardware_compatibility": "ampere_plus"}, "bf16 and hardware_compatibility: ampere_plus can"),
        ("sm75", "fp16", {}, ""),
        ("sm75", "fp16", {"hardware_compatibility": "same_compute_capability"}, ""),
        ("sm80", "bf16", {"hardware_compatibility": "ampere_plus"}, ""),
        ("sm120", "bf16", {}, ""),
        ("", "bf16", {}, ""),
    ],
)
def test_what_turing_lacks_is_said_before_anything_is_built(architecture, precision, options, why, monkeypatch):
    gpu = {**GPU, "gpu": "RTX 2080", "architecture": architecture} if architecture else {}
    found = Probe(True, version="11.4", identity=gpu)
    said = backend.lacks(found, precision, backend.Options(**options))
    assert bool(said) == bool(why)
    if why:
        monkeypatch.setattr(backend, "probe", lambda: found)
        job = replace(JOB, precision=precision, params={"family": "sd", "options": options})
        with pytest.raises(HostError, match=f"unet: {why}") as caught:
            backend.build(Path("nowhere"), Path("nowhere"), job)
        assert "the GPU here is RTX 2080 (sm75)" in caught.value.message


def test_timings_are_kept_outside_the_step_one_file_per_version_and_gpu(tmp_path):
    kept = [
        backend.order(backend.Options(timing_cache=where), replace(JOB, cache=tmp_path), Path("m"), version, gpu)
        for where, version, gpu in (("store", "11.4", GPU), ("store", "11.5", GPU), ("off", "11.4", GPU))
    ]
    assert kept[0].timing_cache == tmp_path / "tensorrt" / "11.4-RTX-4090-CUDA-13-0.timings"
    assert kept[1].timing_cache != kept[0].timing_cache
    assert kept[2].timing_cache is None
    assert backend.order(backend.Options(), JOB, Path("m"), "11.4", GPU).timing_cache is None


@pytest.mark.tiny
def test_an_order_of_this_backend_builds_with_the_library_that_is_here(tmp_path):
    """The code path of TensorRT, given TensorRT-RTX: flags, settings, workspace and profile are taken as they are."""
    pytest.importorskip("tensorrt_rtx", reason="needs pip install 'sdcompile[tensorrt-rtx]'")
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ("B", 8, 32)) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Softmax", ["x"], ["y"], name="s")], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    from sdcompile.backends.trt import compiling

    options = backend.Options(workspace_mib=512, hardware_compatibility="ampere_plus", builder_optimization_level=2)
    order = backend.order(options, JOB, tmp_path / "m.onnx", tensorrt_rtx.VERSION, GPU)
    order = replace(
        order, module="tensorrt_rtx", plan=tmp_path / "e.plan", log=tmp_path / "e.log", table=tmp_path / "e.txt"
    )
    compiling.compile_plan(order, lambda *_: None, "test")
    assert order.plan.stat().st_size > 0


def test_the_probe_says_what_is_missing_first_the_library_then_the_gpu(monkeypatch):
    monkeypatch.setattr("sdcompile.machine.version", lambda name: None)
    assert backend.probe().reason == "tensorrt is not installed"
    monkeypatch.setattr("sdcompile.machine.version", lambda name: "10.3.0" if name == "tensorrt" else None)
    assert "this sdcompile works with 10.13 to 11.x" in backend.probe().reason
    monkeypatch.setattr("sdcompile.machine.version", lambda name: "11.4.0.106" if name == "tensorrt" else None)
    monkeypatch.setattr(driver, "look", lambda: driver.Driver(reason="no NVIDIA driver was found here"))
    found = backend.probe()
    assert (found.available, found.reason) == (False, "no NVIDIA driver was found here")
    assert "tensorrt_rtx" in found.hint
    device = driver.Device("RTX 4090", "sm89", 24 << 30)
    monkeypatch.setattr(driver, "look", lambda: driver.Driver((device,), "CUDA 13.0"))
    assert backend.probe().available
    assert backend.probe().identity["architecture"] == "sm89"


def test_a_build_without_the_library_is_a_host_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sdcompile.machine.version", lambda name: None)
    with pytest.raises(HostError, match="backend tensorrt cannot build here: tensorrt is not installed"):
        backend.build(tmp_path, tmp_path, JOB)
