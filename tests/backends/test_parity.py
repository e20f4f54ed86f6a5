"""Every engine of every backend computes what torch does, in every shape it was built for."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from sdcompile import metrics
from sdcompile.backends import BACKENDS, Host
from sdcompile.backends.base import read_card

pytestmark = pytest.mark.tiny

COMPONENTS = ("text_encoder", "unet", "vae_decoder")
# Engines that cannot run here are tested without running them (test_trt_live) and with a fake GPU (test_trt_engine).
RUNNING = [name for name, backend in BACKENDS.items() if backend.probe().available and not backend.probe().cannot_run]
RIVALS = [
    (name, precision)
    for name in RUNNING
    for precision in BACKENDS[name].realises
    # int8 is fitted to recorded samples, which these random models have none of (tests/test_compression.py).
    if BACKENDS[name].verifiable and (name, precision) != ("reference", "fp32") and precision != "int8"
]


@pytest.fixture(scope="module")
def torch_says(forms, tmp_path_factory):
    """(component, size) -> the fp32 reference's outputs; each reference is opened once."""
    engines = {}

    def outputs(component: str, size: str) -> dict[str, np.ndarray]:
        if component not in engines:
            engines[component] = forms(component).engine("reference", tmp_path_factory.mktemp("reference"))
        return engines[component](forms(component).feeds(size))

    return outputs


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(("backend", "precision"), RIVALS)
def test_an_engine_agrees_with_torch_at_its_smallest_usual_and_largest_shapes(
    backend, precision, component, forms, torch_says, tmp_path
):
    model = forms(component)
    engine = model.engine(backend, tmp_path, precision)
    for size in ("min", "opt", "max"):
        expected, found = torch_says(component, size), engine(model.feeds(size))
        assert expected.keys() == found.keys() == {t.name for t in model.spec.outputs}
        for name, array in found.items():
            assert array.dtype == np.float32
            assert array.shape == expected[name].shape
            floor = metrics.FLOORS[precision]
            assert floor.holds(metrics.snr_db(expected[name], array), metrics.cosine(expected[name], array))
    engine.close()


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("backend", sorted({backend for backend, _ in RIVALS}))
def test_one_changed_weight_breaks_the_agreement(backend, component, forms, torch_says, tmp_path):
    from safetensors.numpy import load_file, save_file

    model = forms(component)
    changed = shutil.copytree(model.checkpoint, tmp_path / "changed")
    path = next(changed.glob("*.safetensors"))
    weights = load_file(path)
    # The last bias or scale of each component: after it nothing can hide the change.
    name = {"unet": "conv_out.bias", "vae_decoder": "decoder.conv_out.bias"}.get(
        component, next((n for n in weights if n.endswith("final_layer_norm.bias")), "")
    )
    weights[name] = weights[name] + np.eye(1, weights[name].size, dtype=np.float32)[0]
    save_file(weights, path)
    engine = forms(component).engine(backend, tmp_path / "engine", next(iter(BACKENDS[backend].realises)))
    (tmp_path / "reference").mkdir()
    BACKENDS["reference"].build(changed, tmp_path / "reference", model.job())
    other = BACKENDS["reference"].open(tmp_path / "reference", Host(threads=1))
    feeds = model.feeds()
    for output, array in engine(feeds).items():
        floor = metrics.FLOORS["bf16"]
        expected = other(feeds)[output]
        assert not floor.holds(metrics.snr_db(expected, array), metrics.cosine(expected, array))


@pytest.mark.parametrize("backend", [name for name in RUNNING if BACKENDS[name].verifiable])
def test_feeds_stay_unchanged_and_outputs_belong_to_the_caller(backend, forms, tmp_path):
    model = forms("unet")
    engine = model.engine(backend, tmp_path)
    feeds = model.feeds()
    kept = {name: array.copy() for name, array in feeds.items()}
    first = engine(feeds)
    before = {name: array.copy() for name, array in first.items()}
    engine(model.feeds(seed=1))
    for name, array in first.items():
        np.testing.assert_array_equal(array, before[name])
        array[...] = 0
    for name, array in feeds.items():
        np.testing.assert_array_equal(array, kept[name])
    np.testing.assert_array_equal(engine(feeds)["out_sample"], before["out_sample"])


@pytest.mark.parametrize("backend", RUNNING)
def test_a_build_writes_into_its_own_folder_only_and_a_copy_opens(backend, forms, tmp_path, monkeypatch):
    model = forms("unet")
    source = shutil.copytree(model.source(backend), tmp_path / "source")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "engine").mkdir()
    BACKENDS[backend].build(source, tmp_path / "engine", model.job())
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    assert not list((tmp_path / "elsewhere").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"source", "elsewhere", "engine"}

    moved = shutil.copytree(tmp_path / "engine", tmp_path / "moved")
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "engine")
    engine = BACKENDS[backend].open(moved, Host(threads=1))
    assert engine.inputs == model.spec.inputs
    assert engine.outputs == model.spec.outputs
    assert engine(model.feeds())["out_sample"].shape == (2, 4, 16, 16)


@pytest.mark.parametrize("backend", RUNNING)
def test_the_card_repeats_what_the_build_was_told(backend, forms, tmp_path):
    model = forms("unet")
    card = read_card(model.build(backend, tmp_path), backend)
    assert (card.component, card.precision, card.spec, card.shapes) == ("unet", "fp32", model.spec, model.shapes)
    assert card.params["family"] == "sd"


def test_the_reference_in_bf16_does_not_round_the_timestep(forms, tmp_path):
    model = forms("unet")
    engine = model.engine("reference", tmp_path, "bf16")
    feeds = model.feeds()
    one = engine({**feeds, "timestep": np.full(2, 997, np.float32)})["out_sample"]
    other = engine({**feeds, "timestep": np.full(2, 998, np.float32)})["out_sample"]
    assert not np.array_equal(one, other)
