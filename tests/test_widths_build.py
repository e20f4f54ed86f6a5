"""A bundle of several widths from recipe to picture: each cut and verified, the one asked for used, none made twice."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.test_build import Place, made

pytestmark = pytest.mark.tiny

PLAIN = """
version: 1
name: slim
family: sd
source: builtin:tiny
backend: onnxruntime
precision: fp32
shapes: {batch: 1, height: 64, width: 64}
samplers: [ddim]
sampler_steps: [1, 4]
defaults: {num_inference_steps: 4, guidance_scale: 3.0}
calibrate: {images: 4, num_inference_steps: 2, max_samples: 8}
verify: {num_inference_steps: 3, prompts: [a large green star on a white background]}
"""
WIDTHS = "components.unet.widths={w75: {channels: {ratio: 0.3}}, w50: {channels: {ratio: 0.5}}}"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    place = Place(tmp_path_factory.mktemp("slim"), PLAIN)
    place.build()
    place.events_of_build = place.build(WIDTHS)
    return place


def manifest(place: Place) -> dict:
    return json.loads((place.bundle() / "manifest.json").read_text())


def test_widths_are_added_to_a_bundle_without_making_anything_of_it_again(built):
    fresh = made(built.events_of_build)
    assert fresh == {
        "pipeline.calibrate.calibrate", "pipeline.package.bundle",
        *(f"unet_{width}.{step}" for width in ("w75", "w50")
          for step in ("prune.channels", "export.onnx", "compile.onnxruntime", "verify.engine")),
    }  # fmt: skip


def test_each_width_is_verified_told_of_and_smaller(built):
    told, size = manifest(built), {}
    for name in ("unet", "unet_w75", "unet_w50"):
        assert told["components"][name]["verification"]["passed"]
        size[name] = sum(f["bytes"] for path, f in told["files"].items() if path.startswith(f"components/{name}/"))
    assert size["unet"] > size["unet_w75"] > size["unet_w50"]
    reports = json.loads((built.bundle() / "reports" / "verify.json").read_text())["reports"]
    assert reports["unet_w50"]["component"] == "unet_w50"
    assert reports["unet_w50"]["own"]["worst"]["snr_db"] > 80, "to the module it was made of"
    assert 5 < reports["unet_w50"]["worst"]["snr_db"] < reports["unet_w75"]["worst"]["snr_db"] < 60, "to the source"
    assert [effect["pass"] for effect in told["components"]["unet_w75"]["effects"]] == ["channels"]
    profiles = json.loads((built.bundle() / "profiles.json").read_text())
    assert profiles["profiles"]["draft"]["unet_width"] == "w50"
    assert {"battery_below": 0.2, "profile": "draft"} in profiles["policy"]


def pictures(built: Place, open_engine=None, **options) -> np.ndarray:
    """Latents and pictures of one request; `open_engine` in place of the bundle's denoiser."""
    import sdcompile

    with sdcompile.load(built.bundle()) as pipe:
        opened = pipe._open_engine
        if open_engine is not None:
            pipe._open_engine = lambda name: open_engine if name.startswith("unet") else opened(name)
        return pipe("a large red circle", seed=5, output_type="np", **options).images


def torch_engine(built: Place, width: str, folder):
    """The pruned module of one width, run by torch."""
    from sdcompile.backends import BACKENDS, Host
    from sdcompile.backends.base import read_card
    from sdcompile.spec import Job

    card = read_card(built.bundle() / "components" / f"unet_{width}", "onnxruntime")
    (artifact,) = (
        path for path in (built.folder / "store").rglob("artifact.json")
        if json.loads(path.read_text())["step"] == f"unet_{width}.prune.channels"
    )  # fmt: skip
    folder.mkdir()
    job = Job(card.component, {**card.params, "options": {}}, "fp32", card.spec, card.shapes)
    BACKENDS["reference"].build(artifact.parent, folder, job)
    return BACKENDS["reference"].open(folder, Host())


def test_a_picture_of_a_width_is_what_torch_draws_with_that_widths_module(built, tmp_path):
    from sdcompile.metrics import psnr_db

    for width, other in (("w75", "w50"), ("w50", "w75")):
        expected = pictures(built, torch_engine(built, width, tmp_path / width))[0]
        assert psnr_db(expected, pictures(built, unet_width=width)[0]) > 60
        assert psnr_db(expected, pictures(built, unet_width=other)[0]) < 40, "the wrong engine would be seen"
        assert psnr_db(expected, pictures(built, unet_width="full")[0]) < 40


def test_generate_inspect_and_verify_know_of_widths(built):
    from PIL import Image

    ask = ("generate", built.bundle(), "a red circle", "--seed", "1", "--output", built.folder / "made")
    built.run(*ask, "--unet-width", "w50")
    (path,) = (built.folder / "made").glob("*.png")
    assert Image.open(path).text["unet_width"] == "w50"
    told = built.run(*ask, "--unet-width", "w60", expect=7)
    assert "'w60' is not one of its widths (full, w75, w50)" in told.stderr
    assert "widths    full, w75, w50" in built.run("inspect", built.bundle()).stdout
    (result,) = [event for event in built.events("verify", built.bundle()) if event["event"] == "result"]
    assert result["reports"]["unet_w50"]["passed"]
    assert set(result["reports"]) == {"text_encoder", "unet", "vae_decoder", "unet_w75", "unet_w50", "pipeline"}


def test_a_floor_that_one_width_misses_stops_the_build_by_its_name(built):
    events = built.build(WIDTHS, "verify.unet_w50={min_snr_db: 70}", expect=5)
    assert made(events) == {"unet_w50.verify.engine"}
    (fault,) = [event for event in events if event["event"] == "error"]
    assert "unet_w50" in fault["message"]
    assert "verify: {unet_w50:" in fault["hint"]
