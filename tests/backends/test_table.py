"""The backends' table, their probes and the choices they make, with no model and no library needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from sdcompile.backends import BACKENDS, Host, openvino, racing, stub
from sdcompile.backends.base import Card, card_from_job, read_card, write_card
from sdcompile.backends.trt import driver
from sdcompile.errors import StageError
from sdcompile.spec import PRECISIONS, ComponentSpec, Job, Range, TensorSpec

SPEC = ComponentSpec(
    "vae_decoder",
    (TensorSpec("latent_sample", ("B", 4, "h", "w"), "float32"),),
    (TensorSpec("sample", ("B", 3, "H", "W"), "float32"),),
)
LATENTS, PIXELS = Range(8, 8, 16), Range(64, 64, 128)
SHAPES = {"B": Range(1, 1, 2), "h": LATENTS, "w": LATENTS, "H": PIXELS, "W": PIXELS}
JOB = Job("vae_decoder", {"family": "sd", "options": {}}, "fp32", SPEC, SHAPES)


@pytest.mark.parametrize("name", list(BACKENDS))
def test_every_row_is_whole(name):
    backend = BACKENDS[name]
    assert backend.name == name
    assert backend.takes in ("checkpoint", "onnx")
    assert set(backend.realises) <= set(PRECISIONS)
    assert "fp32" in backend.realises
    assert issubclass(backend.options, BaseModel)
    backend.options()
    with pytest.raises(ValidationError):
        backend.options(no_such_option=1)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "stub"])
def test_a_probe_says_what_is_missing_and_how_to_get_it(name, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", _not_installed)
    found = BACKENDS[name].probe()
    assert not found.available
    assert "is not installed" in found.reason
    assert "pip install 'sdcompile[" in found.hint


def _not_installed(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("installed", "devices", "warned"),
    [
        ({"onnxruntime"}, ("cpu",), False),
        ({"onnxruntime-gpu"}, ("cpu", "cuda"), False),
        ({"onnxruntime", "onnxruntime-gpu"}, ("cpu", "cuda"), True),
    ],
)
def test_either_onnxruntime_distribution_will_do_but_not_both(installed, devices, warned, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda n: "1" if n in installed else _not_installed(n))
    monkeypatch.setattr(driver, "look", lambda: driver.Driver((driver.Device("GPU", "sm89", 1),), "CUDA 13.0"))
    found = BACKENDS["onnxruntime"].probe()
    assert found.available
    assert found.devices == devices
    assert any("both installed" in note for note in found.notes) is warned


def test_probing_imports_no_engine_library():
    code = "import sys, sdcompile.backends as b; [x.probe() for x in b.BACKENDS.values()]; print(*sys.modules)"
    made = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"numpy", "torch", "onnxruntime", "openvino"} & set(made.stdout.split())


def test_a_card_survives_its_file(tmp_path):
    write_card(tmp_path, card_from_job("stub", JOB, {"figure": 1.5}))
    card = read_card(tmp_path, "stub")
    assert card == Card("stub", "vae_decoder", "fp32", SPEC, SHAPES, JOB.params, {"figure": 1.5})


def test_a_missing_card_is_told_in_words(tmp_path):
    with pytest.raises(StageError, match="holds no whole engine"):
        read_card(tmp_path, "stub")


@pytest.fixture
def stub_engine(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "out").mkdir()
    stub.build(tmp_path / "src", tmp_path / "out", JOB)
    return stub.open_engine(tmp_path / "out", Host())


def test_the_stub_turns_latents_into_pixels_by_the_ratio_of_its_shapes(stub_engine):
    pixels = stub_engine({"latent_sample": np.zeros((2, 4, 16, 8), np.float32)})["sample"]
    assert pixels.shape == (2, 3, 128, 64)
    assert pixels.dtype == np.float32
    assert np.abs(pixels).max() <= 1


def test_the_stub_answers_equal_feeds_equally_and_others_otherwise(stub_engine):
    feeds = {"latent_sample": np.zeros((1, 4, 8, 8), np.float32)}
    first = stub_engine(feeds)["sample"]
    np.testing.assert_array_equal(stub_engine(feeds)["sample"], first)
    feeds["latent_sample"][0, 0, 0, 0] = 1e-6
    assert not np.array_equal(stub_engine(feeds)["sample"], first)


def test_the_stub_refuses_a_shape_that_is_not_its_spec(stub_engine):
    with pytest.raises(StageError, match="latent_sample has 5 on axis 1"):
        stub_engine({"latent_sample": np.zeros((1, 5, 8, 8), np.float32)})
    with pytest.raises(StageError, match="the stub takes"):
        stub_engine({"latent_sample": np.zeros((4, 8, 8), np.float32)})


@pytest.mark.parametrize(
    ("static_ms", "dynamic_ms", "first_ms", "chosen"),
    [
        (100, 114, 1000, "static"),
        (100, 102, 0, "dynamic"),  # a tie
        (100, 90, 0, "dynamic"),
        (1, 1.2, 1000, "dynamic"),  # a compilation that 100 calls do not pay for
    ],
)
def test_static_shapes_must_be_cheaper_and_pay_for_their_compilation(static_ms, dynamic_ms, first_ms, chosen):
    timings = {
        "static": {"cpu_ms": static_ms, "first_cpu_ms": first_ms},
        "dynamic": {"cpu_ms": dynamic_ms, "first_cpu_ms": 0},
    }
    assert openvino.choose_shape_mode(timings) == chosen


@pytest.mark.parametrize(("fp16_ms", "chosen"), [(90, "fp16"), (104, "fp16"), (106, "bf16")])
def test_fp16_is_taken_where_it_ties_with_bf16(fp16_ms, chosen):
    assert openvino.choose_half({"bf16": {"cpu_ms": 100}, "fp16": {"cpu_ms": fp16_ms}}) == chosen


class Counted:
    """An engine that counts how many of its kind are open."""

    inputs = outputs = ()
    facts: dict[str, str] = {}  # noqa: RUF012
    alive = most = 0

    def __init__(self) -> None:
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __call__(self, feeds):
        return {}

    def close(self) -> None:
        Counted.alive -= 1


@pytest.mark.parametrize(("together", "most"), [(True, 2), (False, 1)])
def test_a_race_holds_as_many_engines_as_it_was_allowed(together, most):
    Counted.alive = Counted.most = 0
    timings = racing.race({"a": Counted, "b": Counted}, {}, together=together)
    assert (Counted.most, Counted.alive) == (most, 0)
    assert timings["a"]["calls"] == timings["b"]["calls"] == 9


@pytest.mark.skipif(sys.platform != "linux", reason="the page trick is Linux's")
def test_released_pages_come_back_with_the_same_bytes(tmp_path):
    import mmap

    from sdcompile.backends import mapped

    content = bytes(range(256)) * 4096
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as view:
        assert bytes(view) == content
        resident = _resident_bytes(path)
        with mapped.pages_released(tmp_path):
            pass
        assert _resident_bytes(path) < resident
        assert bytes(view) == content
    mapped.trim()


def _resident_bytes(path: Path) -> int:
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(str(path)))
    return int(next(line for line in lines[start:] if line.startswith("Rss:")).split()[1]) * 1024
