"""Sampling with latents that stay on a device: the bits of the host's loop, and when they come to the host after all.

The device is a played one (tests.backends.played_cuda) behind the real TensorRT engine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdcompile import selftest
from sdcompile.backends import Host, Probe
from sdcompile.backends.base import Card, write_card
from sdcompile.backends.trt import cuda, engine
from sdcompile.backends.trt.arrays import DeviceArrays
from sdcompile.errors import StageError
from sdcompile.families import FAMILIES
from sdcompile.runtime import joining
from sdcompile.runtime.denoising import Denoiser
from sdcompile.runtime.ondevice import DeviceDenoiser, device_for
from sdcompile.runtime.output import Clock
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.runtime.sampler import sample
from sdcompile.runtime.stepcache import DeepFeatures
from sdcompile.runtime.tables import NOISE, OUTPUT, STATE, Call, Start, Table, Term, load, save
from sdcompile.samplers import SAMPLERS
from sdcompile.spec import ComponentSpec, Range, TensorSpec
from tests.backends.played_cuda import FakeCuda, fake_trt, kernels
from tests.runtime.test_pipeline import SHAPES, Engines, model_in

SPEC = ComponentSpec(
    "unet",
    (
        TensorSpec("sample", ("R", 4, "h", "w"), "float32"),
        TensorSpec("timestep", ("R",), "float32"),
        TensorSpec("encoder_hidden_states", ("R", "T", 5), "float32"),
    ),
    (TensorSpec("out", ("R", 4, "h", "w"), "float32"),),
)
FACTS = {"version": "1", "engines": {"portable": {"plan": "portable.plan"}}}
HERE = Probe(available=True, version="1", identity={"gpu": "RTX 4090", "architecture": "sm89", "driver": "CUDA 13.0"})

Compute = Callable[[Mapping[str, np.ndarray]], np.ndarray]


def unet(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    text = feeds["encoder_hidden_states"].mean(axis=(1, 2))[:, None, None, None]
    return np.tanh(feeds["sample"] * text) + feeds["timestep"][:, None, None, None] * np.float32(1e-4)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def opened(library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Opens the played denoiser; gives the engine and the driver it talks to."""

    def open_it(compute: Compute = unet, rows: Range = SHAPES["R"], **options: Any) -> tuple[Any, FakeCuda]:
        api, folder = FakeCuda(library), tmp_path / "unet"
        monkeypatch.setattr(cuda, "load", lambda: api)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_trt(api, compute=compute, output="out"))
        folder.mkdir(exist_ok=True)
        card = Card("tensorrt_rtx", "unet", "fp16", SPEC, SHAPES | {"R": rows}, {"options": options}, FACTS)
        write_card(folder, card)
        (folder / "portable.plan").write_bytes(b"plan")
        return engine.open_plan("tensorrt_rtx", "tensorrt_rtx", folder, Host(cache=tmp_path), HERE), api

    return open_it


# --- the loop -----------------------------------------------------------------------------------


def some_table(seed: int, calls: int = 6, draws: int = 0) -> Table:
    """Coefficients of no scheduler, which look back at everything a table can look back at."""
    source = np.random.default_rng(seed)
    kinds = [(STATE, 0), (OUTPUT, 0), (STATE, 2), (OUTPUT, 1), (OUTPUT, 3), *((NOISE, lag) for lag in range(draws))]

    def call(index: int) -> Call:
        terms = tuple(Term(kind, lag, source.normal() / 2) for kind, lag in kinds if kind == NOISE or lag <= index)
        return Call(900.0 - 90 * index, 1.0 if index % 3 == 2 else source.uniform(0.1, 1), draws, terms, (1.1, -0.3))

    made = tuple(call(index) for index in range(calls))
    # The first calls look back no further than a beginning can.
    return Table("hand", calls, 3.7, made, tuple(Start(index, 0.5, 1.5, made[:3]) for index in range(calls)))


def both(
    opened: Callable[..., Any], table: Table, compute: Compute = unet, images: int = 2, **given: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The final latents, made on the host and on the device, by the same engine with the same noise."""
    running, _ = opened(compute)
    count = len(table.calls)
    # Guided, except in the middle: there the engine takes half as many rows.
    scales = tuple(1.0 if index == count // 2 else 3.0 + 0.1 * index for index in range(count))
    source = np.random.default_rng(1)
    positive, negative = source.standard_normal((2, images, 6, 5)).astype(np.float32)
    denoiser = Denoiser(
        running, FAMILIES["sd"], {}, SHAPES["R"], tuple(call.timestep for call in table.calls), scales, 0.0,
        {"encoder_hidden_states": positive}, {"encoder_hidden_states": negative}, Clock(),
    )  # fmt: skip

    def made(**arrays: Any) -> np.ndarray:
        draws = np.random.default_rng(2)
        noise = [draws.standard_normal((images, 4, 4, 6)).astype(np.float32) for _ in range(1 + 3 * count)]
        denoise = DeviceDenoiser.of(denoiser, arrays["arrays"]) if arrays else denoiser
        return sample(table, denoise, noise.pop(), noise.pop, **given, **arrays)

    return made(), made(arrays=running.arrays)


TABLES = {
    "multistep": some_table(0),
    "stochastic": some_table(1, draws=1),
    "two draws a step": some_table(2, draws=2),
    "staged": joining.joined([some_table(3), some_table(4)], [2])[0],
    "begun later": joining.begun_at(some_table(5), 2),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_device_gives_the_bits_of_the_host(opened, name):
    clean = {"clean": np.full((1, 4, 4, 6), 0.3, np.float32)} if name == "begun later" else {}
    host, device = both(opened, TABLES[name], **clean)
    assert np.isfinite(host).all()
    assert device.tobytes() == host.tobytes()


@pytest.mark.tiny
def test_every_shipped_sampler_gives_the_bits_of_the_host(opened):
    pytest.importorskip("diffusers")
    from sdcompile.steps.sampler import table

    config = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False,
    }  # fmt: skip
    different = []
    for name, row in SAMPLERS.items():
        host, device = both(opened, table(row.scheduler, config, 6, row.config))
        different += [] if device.tobytes() == host.tobytes() else [name]
    assert different == []


@pytest.mark.parametrize(
    "breaks",
    [
        lambda real: lambda arrays, terms: real(arrays, [(a, value * (1 + 1e-6)) for a, value in terms]),
        lambda real: lambda arrays, terms: real(arrays, terms[:-1]),
    ],
    ids=["another coefficient", "a term is missing"],
)
def test_a_sum_that_is_not_the_tables_is_seen(opened, monkeypatch, breaks):
    monkeypatch.setattr(DeviceArrays, "weighted", breaks(DeviceArrays.weighted))
    host, device = both(opened, TABLES["multistep"])
    assert device.tobytes() != host.tobytes()


def test_guidance_of_another_scale_is_seen(opened, monkeypatch):
    real = DeviceArrays.guided
    monkeypatch.setattr(DeviceArrays, "guided", lambda self, a, b, scale: real(self, a, b, scale + 1e-6))
    host, device = both(opened, TABLES["multistep"])
    assert device.tobytes() != host.tobytes()


def test_a_value_that_is_not_finite_is_told_of_the_step_it_came_up_in(opened):
    def bad(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        made = unet(feeds)
        # Timestep 720 is that of the third call.
        made[:, 0, 0, 0] = np.where(feeds["timestep"] <= 720, np.inf, made[:, 0, 0, 0])
        return made

    table = some_table(0)
    messages = []
    for device in (False, True):
        running, _ = opened(bad)
        with pytest.raises(StageError, match=r"the denoiser's output at step 3 of 6 .* 2 of 192 values") as caught:
            sampled(running, table, device)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def sampled(running: Any, table: Table, device: bool) -> np.ndarray:
    """Two unguided images."""
    denoiser = Denoiser(
        running, FAMILIES["sd"], {}, SHAPES["R"], tuple(call.timestep for call in table.calls),
        (1.0,) * len(table.calls), 0.0, {"encoder_hidden_states": np.ones((2, 6, 5), np.float32)}, None, Clock(),
    )  # fmt: skip
    noise = np.ones((2, 4, 4, 6), np.float32)
    if device:
        return sample(table, DeviceDenoiser.of(denoiser, running.arrays), noise, arrays=running.arrays)
    return sample(table, denoiser, noise)


def test_steps_follow_each_other_without_a_copy_to_the_host_and_without_waiting(opened):
    running, api = opened()
    sampled(running, some_table(0), True)
    api.calls.clear()
    sampled(running, some_table(0), True)
    assert api.calls.count("cuGraphLaunch") == 6
    # The initial latents and the timesteps in; counters and latents out. The text is still there.
    assert api.calls.count("cuMemcpyHtoDAsync") == 3, "latents, timesteps, and a prompt that is a new array"
    assert api.calls.count("cuMemcpyDtoHAsync") == 2
    last = api.calls.index("cuMemcpyDtoHAsync")
    assert "cuStreamSynchronize" not in api.calls[api.calls.index("cuGraphLaunch") : last - 1]
    assert "cuMemAlloc" not in api.calls, "blocks are used again"


# --- the pipeline -------------------------------------------------------------------------------


class Mixed(Engines):
    """Engines in numpy, but for the denoiser."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.denoiser = denoiser

    def __call__(self, component: str) -> Any:
        return self.denoiser if component == "unet" else super().__call__(component)


@pytest.fixture
def made(opened, tmp_path):
    """Makes the images of a request with a denoiser that keeps latents on its device, or may not."""

    def make(prompt: Any = "red circle", device_latents: bool = True, **options: Any) -> Any:
        running, _ = opened(device_latents=device_latents)
        model = model_in(tmp_path)
        starts = tuple(Start(index, 0.8, 0.6) for index in range(4))
        save(tmp_path, "ddim", [replace(load(tmp_path, "ddim", 4), starts=starts)])
        with Pipeline(model, Mixed(running)) as pipe:
            return pipe(prompt, **{"seed": 5, "output_type": "latent", "sampler": "euler_ancestral", **options})

    return make


def test_the_pipeline_keeps_latents_on_the_device_and_says_so(made):
    device, host = made(), made(device_latents=False)
    assert (device.timings["on_device"], host.timings["on_device"]) == ([True], [False])
    assert device.images.tobytes() == host.images.tobytes()
    np.testing.assert_allclose(device.timings["denoise_s"], [1e-3] * 4)
    counts = ("denoise_rows", "denoise_shallow", "steps")
    assert [device.timings[name] for name in counts] == [host.timings[name] for name in counts]


def test_whoever_watches_is_told_of_finished_steps_and_latents_stay(made):
    told: list[int] = []
    found = made(watch=told.append)
    assert told == [0, 1, 2, 3]
    assert found.timings["on_device"] == [True]
    assert found.images.tobytes() == made().images.tobytes()


@pytest.mark.parametrize(
    ("options", "on_device"),
    [
        ({"num_images_per_prompt": 2}, [True]),
        ({"guidance_schedule": "linear", "guidance_interval": "0.3..1"}, [True]),
        ({"num_images_per_prompt": 3}, [False]),
        ({"guidance_rescale": 0.7}, [False]),
        ({"callback_on_step_end": lambda pipe, step, timestep, arrays: None}, [False]),
        ({"early_stop": "0.001", "sampler": "ddim"}, [False]),
        ({"height": 128, "width": 64, "tiling": "auto"}, [False]),
        ({"height": 32, "width": 32, "hires": "2@0.5", "sampler": "ddim"}, [True, True]),
        ({"height": 48, "width": 48, "hires": "2", "sampler": "ddim", "tiling": "auto"}, [True, False]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
def test_latents_come_to_the_host_for_what_looks_at_them_there(made, options, on_device):
    found = made(**options)
    assert found.timings["on_device"] == on_device
    assert found.images.tobytes() == made(device_latents=False, **options).images.tobytes()


def test_a_table_of_more_terms_than_a_kernel_takes_is_sampled_on_the_host(made, monkeypatch):
    monkeypatch.setattr(DeviceArrays, "most_terms", 2)
    assert made().timings["on_device"] == [False]
    assert made(sampler="ddim").timings["on_device"] == [True]


def test_cached_steps_are_made_on_the_host(opened):
    running, _ = opened()
    denoiser = Denoiser(
        running, FAMILIES["sd"], {}, SHAPES["R"], (9.0,), (1.0,), 0.0, {}, None, Clock(), features=DeepFeatures(2)
    )
    request = SimpleNamespace(early_stop=None)
    assert device_for(denoiser, some_table(0, 1), request, 2, looks=False) is None
    assert device_for(replace(denoiser, features=None), some_table(0, 1), request, 2, looks=False) is running.arrays


def test_the_selftest_compares_latents_of_the_device_with_those_of_the_host(opened, tmp_path, monkeypatch):
    model = model_in(tmp_path)
    monkeypatch.setattr(selftest, "_STEPS", 4)
    monkeypatch.setattr(selftest, "_PROMPT", "red circle")
    real = DeviceArrays.weighted
    for weighted, same in ((real, True), (lambda self, terms: real(self, terms[:-1]), False)):
        monkeypatch.setattr("sdcompile.load", lambda bundle: Pipeline(model, Mixed(opened()[0])))
        monkeypatch.setattr(DeviceArrays, "weighted", weighted)
        assert selftest._timed(Path("bundle"))["latents"] == {"on_device": True, "as_on_host": same}
