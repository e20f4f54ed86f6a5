"""Which of an engine's plans a machine runs: what the driver tells, and every refusal with its way out."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest

import sdcompile.backends.tensorrt as tensorrt
from sdcompile.backends import BACKENDS, Host, Probe, tensorrt_rtx
from sdcompile.backends.base import write_card
from sdcompile.backends.trt import cuda, driver, targets
from sdcompile.backends.trt.fitting import fits
from sdcompile.errors import HostError
from sdcompile.recipe import load
from sdcompile.runtime.choosing import fitting
from tests.backends.test_trt_engine import ADA, CARD

NOWHERE = "no NVIDIA driver was found here"
OF_ONE_GPU = replace(
    CARD, backend="tensorrt", params={"family": "sd", "options": {"hardware_compatibility": "none"}},
    measured={"version": "11.4.0", "engines": {"sm89": {}}, "built_on": ADA.identity},
)  # fmt: skip

# --- refusals ---------------------------------------------------------------------------------


def test_without_a_driver_no_runtime_is_made_and_the_error_says_what_was_built(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "look", lambda: driver.Driver(reason=NOWHERE))
    monkeypatch.setattr("sdcompile.machine.version", lambda name: tensorrt_rtx.VERSION)
    monkeypatch.setattr(cuda, "load", lambda: pytest.fail("nothing may be touched"))
    write_card(tmp_path, CARD)
    with pytest.raises(HostError, match=f"was built for portable, sm86 and cannot run here: {NOWHERE}") as caught:
        tensorrt_rtx.open_engine(tmp_path, Host())
    assert "--set backend=openvino" in caught.value.hint
    monkeypatch.setattr("sdcompile.machine.version", lambda name: "11.4.0" if name == "tensorrt" else None)
    write_card(tmp_path, OF_ONE_GPU)
    with pytest.raises(HostError, match=rf"built for RTX 4090 \(sm89\) and cannot run here: {NOWHERE}") as caught:
        tensorrt.open_engine(tmp_path, Host())
    assert "--set backend=openvino" in caught.value.hint


def test_a_bundle_says_what_its_engines_are_for_where_their_backend_is_not_available(tmp_path):
    found = Probe(False, version="11.4.0", reason=NOWHERE, hint="build elsewhere")
    backend = replace(BACKENDS["tensorrt"], probe=lambda: found, fits=lambda folder: fits(OF_ONE_GPU, found))
    entry = SimpleNamespace(backend="tensorrt")
    manifest = SimpleNamespace(family="sd", components={"unet": entry}, folder_of=lambda name: name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "tensorrt", backend)
        with pytest.raises(HostError, match=r"unet \(tensorrt\) was built for RTX 4090 \(sm89\) and cannot run here"):
            fitting(tmp_path, manifest, "unet")


def test_an_engine_of_one_gpu_is_not_run_on_another_of_its_architecture_unless_it_was_built_to_be():
    here = replace(ADA, version="11.4.0")
    other = replace(here, identity={**here.identity, "gpu": "L4"})
    assert fits(OF_ONE_GPU, here) == "sm89"
    with pytest.raises(HostError, match=r"built for RTX 4090 \(sm89\); the GPU here is L4 \(sm89\)") as caught:
        fits(OF_ONE_GPU, other)
    assert caught.value.hint == "rebuild it for this GPU: sdcompile build RECIPE  (on that machine)"
    same = replace(OF_ONE_GPU, params={"options": {"hardware_compatibility": "same_compute_capability"}})
    assert fits(same, other) == "sm89"
    plus = replace(
        OF_ONE_GPU, params={"options": {"hardware_compatibility": "ampere_plus"}},
        measured={**OF_ONE_GPU.measured, "engines": {"ampere_plus": {}}},
    )  # fmt: skip
    assert fits(plus, other) == "ampere_plus"


@pytest.mark.parametrize(
    ("here", "runs"), [("11.4.0", True), ("11.4.1", True), ("11.10.0", True), ("11.3.9", False), ("10.13.3", False)]
)
def test_a_version_compatible_engine_runs_on_its_version_and_later_ones(here, runs):
    options = {"hardware_compatibility": "none", "version_compatible": True}
    card, found = replace(OF_ONE_GPU, params={"options": options}), replace(ADA, version=here)
    if runs:
        assert fits(card, found) == "sm89"
        return
    with pytest.raises(
        HostError, match=f"version 11.4.0 .* {here} is installed, and this one runs on that version and"
    ):
        fits(card, found)


@pytest.mark.parametrize(
    "recipe",
    [
        "backend: tensorrt_rtx\nbuild: {compute_capabilities: [sm86]}\n",
        "backend: tensorrt_rtx\n",
        "backend: openvino\ncomponents: {unet: {backend: tensorrt_rtx, build: {compute_capabilities: [sm86]}}}\n",
    ],
)
@pytest.mark.parametrize("lacking", ["a GPU", "its architecture"])
def test_the_command_of_a_hint_fits_the_recipe(recipe, lacking, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"version: 1\nname: x\nfamily: sd\nsource: builtin:tiny\nprecision: fp16\nsamplers: [ddim]\n{recipe}"
    )
    hopper = replace(ADA, identity={"gpu": "H100", "architecture": "sm90", "driver": "CUDA 13.0"})
    with pytest.raises(HostError) as caught:
        fits(CARD, replace(ADA, cannot_run=NOWHERE) if lacking == "a GPU" else hopper)
    words = shlex.split(caught.value.hint)
    sets = [word for before, word in pairwise(words) if before == "--set"]
    read = load(path, sets)
    assert {read.effective(name).backend for name in ("unet", "vae_decoder")} == {
        "openvino" if lacking == "a GPU" else "tensorrt"
    }


def test_a_gpu_it_was_not_built_for_is_named_with_the_command_that_builds_for_it():
    hopper = replace(ADA, identity={"gpu": "H100", "architecture": "sm90", "driver": "CUDA 13.0"})
    with pytest.raises(HostError, match=r"built for portable, sm86; the GPU here is H100 \(sm90\)") as caught:
        fits(CARD, hopper)
    assert "--set backend=tensorrt " in caught.value.hint, "TensorRT-RTX has no such target"
    ada = replace(CARD, measured={**CARD.measured, "engines": {"sm86": {}}})
    with pytest.raises(HostError, match=r"built for sm86; the GPU here is RTX 4090 \(sm89\)") as caught:
        fits(ada, ADA)
    assert "--set 'build.compute_capabilities=[sm89]'" in caught.value.hint


def test_another_version_of_the_library_is_refused():
    with pytest.raises(HostError, match=r"built with version 1\.7\.1\.116 .* 1\.8\.0 is installed"):
        fits(CARD, replace(ADA, version="1.8.0"))


def test_a_missing_library_and_missing_bindings_are_host_errors(monkeypatch):
    with pytest.raises(HostError, match="tensorrt_rtx is not installed"):
        fits(CARD, Probe(available=False, reason="tensorrt_rtx is not installed", hint="pip install x"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(HostError, match="cuda-bindings is not installed"):
        cuda.load()


# --- choosing and looking ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "device", "chosen"),
    [
        (("portable", "sm89"), "sm89", "sm89"),
        (("portable", "sm89"), "sm86", "portable"),
        (("portable",), "sm75", None),
        (("portable",), "sm90", None),
        (("sm86",), "sm89", None),
        (("ampere_plus",), "sm90", "ampere_plus"),
        (("ampere_plus",), "sm75", None),
    ],
)
def test_a_gpu_gets_its_own_engine_else_the_portable_one(built, device, chosen):
    assert targets.choose(built, device) == chosen


class FakeLibrary:
    """libcuda.so.1 as ctypes sees it."""

    def __init__(self, count=1, init=0):
        self.count, self.init = count, init

    def cuInit(self, flags):  # noqa: N802
        return self.init

    def cuDriverGetVersion(self, version):  # noqa: N802
        version._obj.value = 13000
        return 0

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device, index):  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name, size, device):  # noqa: N802
        name.value = b"NVIDIA GeForce RTX 4090"
        return 0

    def cuDeviceTotalMem_v2(self, memory, device):  # noqa: N802
        memory._obj.value = 24 << 30
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0


def test_the_driver_tells_its_devices():
    found = driver.ask(FakeLibrary())
    assert found.devices == (driver.Device("NVIDIA GeForce RTX 4090", "sm89", 24 << 30),)
    assert found.identity == {"gpu": "NVIDIA GeForce RTX 4090", "architecture": "sm89", "driver": "CUDA 13.0"}
    assert found.reason == ""


def test_a_driver_without_a_gpu_and_one_that_does_not_start_are_reasons():
    assert driver.ask(FakeLibrary(count=0)).reason == "no NVIDIA GPU was found here"
    assert "cuInit: CUDA error 100" in driver.ask(FakeLibrary(init=100)).reason


def test_plans_refuse_what_no_compiler_could_build():
    backend = BACKENDS["tensorrt_rtx"]
    said = backend.refuses("fp32", backend.options(compute_capabilities=("sm75", "sm89")))
    assert said == ["fp32 engines cannot be built for sm75: Turing has no FP32 GEMM in TensorRT-RTX"]
    assert backend.refuses("fp16", backend.options(compute_capabilities=("sm75",))) == []
