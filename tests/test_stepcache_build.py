"""A bundle with cached steps from recipe to picture: both engines verified, the cost told, and stopped by its floor."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from tests.test_build import Place, made

pytestmark = pytest.mark.tiny

RECIPE = """
version: 1
name: cached
family: sd
source: builtin:tiny
backend: onnxruntime
precision: fp32
shapes: {batch: 1, height: [64, 64, 80], width: 64}
samplers: [ddim]
sampler_steps: [1, 6]
defaults: {num_inference_steps: 6, guidance_scale: 3.0}
components: {unet: {step_cache: {every: 3, depth: 3}}}
verify: {num_inference_steps: 6, prompts: [a large green star on a white background]}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    place = Place(tmp_path_factory.mktemp("cached"), RECIPE)
    place.events_of_build = place.build()
    return place


def manifest(place: Place) -> dict:
    return json.loads((place.bundle() / "manifest.json").read_text())


def test_both_engines_are_verified_on_recorded_features(built):
    told = manifest(built)
    for name in ("unet", "unet_cached"):
        assert told["components"][name]["verification"]["passed"]
        assert told["components"][name]["verification"]["worst"]["snr_db"] > 60
    rows = json.loads((built.bundle() / "reports" / "verify.json").read_text())["reports"]
    assert {row["trajectory"] for row in rows["unet_cached"]["samples"]} == {"00-cached", "01-cached", "02-cached"}
    assert all(row["step"] % 3 for row in rows["unet_cached"]["samples"]), "recorded at cached steps alone"
    assert not any("cached" in row["trajectory"] for row in rows["unet"]["samples"])


def test_pictures_with_cached_steps_agree_with_torchs_and_tell_what_they_cost(built):
    told = manifest(built)["verification"]["images"]
    rows = json.loads((built.bundle() / "reports" / "verify.json").read_text())["reports"]["pipeline"]["samples"]
    assert {row["step_cache"] for row in rows} == {"off", 3}
    assert all(row["psnr_db"] > 60 for row in rows)
    cost = told["step_cache"]
    assert 10 < cost["psnr_db"]["min"] < 60, "an approximation: near, and not the same"
    assert cost["every"] == 3
    assert cost["floor"]["min_psnr_db"] is None
    assert cost["passed"]
    assert "cost of step caching" in (built.bundle() / "reports" / "verify.xml").read_text()


def test_a_floor_of_the_cost_stops_the_build_and_moves_no_engine(built):
    floor = "components.unet.step_cache.min_psnr_db=90"
    events = built.build(floor, "verify.on_fail=fallback", expect=5)
    assert made(events) == {"pipeline.verify.images"}
    (fault,) = [event for event in events if event["event"] == "error"]
    assert "images with cached steps (every 3 of 6) are too far from the reference's without" in fault["message"]
    assert "min_psnr_db" in fault["hint"]


def test_a_bundle_uses_it_by_default_and_can_be_asked_not_to(built):
    import sdcompile

    pipe = sdcompile.load(built.bundle())
    cached = pipe("a red circle", seed=1, output_type="np")
    plain = pipe("a red circle", seed=1, output_type="np", step_cache="off")
    assert cached.timings["denoise_shallow"] == [False, True, True, False, True, True]
    assert not any(plain.timings["denoise_shallow"])
    assert not np.array_equal(cached.images, plain.images)
    tall = pipe("a red circle", seed=1, output_type="np", height=80)
    assert tall.images.shape[1] == 80


def test_inspect_and_generate_know_of_it(built):
    assert "cached steps, one of every 3 whole, depth 3" in built.run("inspect", built.bundle()).stdout
    ask = ("generate", built.bundle(), "a red circle", "--output", built.folder / "made", "--step-cache")
    built.run(*ask, "2")
    told = built.run(*ask, "often", expect=2)
    assert "step_cache='often' is no number of calls" in told.stderr


def test_a_finished_bundle_is_verified_again_with_its_cost(built):
    events = built.events("verify", built.bundle())
    (result,) = [event for event in events if event["event"] == "result"]
    assert result["reports"]["pipeline"]["step_cache"]["every"] == 3
    assert not made(events), "the recording is the build's own"


def test_a_shallow_engine_with_one_wrong_weight_is_found(built, tmp_path):
    """The engine is built once more, from its own graph with some of a convolution's weights shifted."""
    import onnx
    from onnx import numpy_helper

    from sdcompile.backends import BACKENDS
    from sdcompile.backends.base import read_card
    from sdcompile.metrics import FLOORS
    from sdcompile.samples import Samples
    from sdcompile.spec import Job
    from sdcompile.steps import verify

    store, backend = built.folder / "store", BACKENDS["onnxruntime"]
    samples = Samples(next(store.rglob("samples.json")).parent, "unet_cached")
    engine = built.bundle() / "components" / "unet_cached"
    assert verify.judge(backend, engine, samples, FLOORS["fp32"])["passed"]
    exported = next(path.parent for path in store.rglob("model.onnx") if _takes_deep(path))
    # A copy of its own: onnx reads no weights from files that have other links, as those of the store do.
    shutil.copytree(exported, tmp_path / "exported")
    model = onnx.load(tmp_path / "exported" / "model.onnx")
    weight = next(t for t in model.graph.initializer if t.name.endswith("up_blocks.2.resnets.1.conv1.weight"))
    changed = numpy_helper.to_array(weight).copy()
    changed[0] += 0.2
    weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    for folder in ("onnx", "engine"):
        (tmp_path / folder).mkdir()
    onnx.save(model, tmp_path / "onnx" / "model.onnx")
    card = read_card(engine, backend.name)
    job = Job("unet_cached", card.params, "fp32", card.spec, card.shapes)
    backend.build(tmp_path / "onnx", tmp_path / "engine", job)
    report = verify.judge(backend, tmp_path / "engine", samples, FLOORS["fp32"])
    assert not report["passed"]
    assert report["worst"]["snr_db"] < 60


def _takes_deep(path) -> bool:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return "deep" in [value.name for value in graph.input]
