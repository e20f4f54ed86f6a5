"""A bundle of several widths from recipe to picture: each cut and verified, and the one that is asked for used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.test_build import Place

pytestmark = pytest.mark.tiny

# The narrow width is exported and compiled; all else is run by torch, which takes no time to build.
RECIPE = """
version: 1
name: slim
family: sd
source: builtin:tiny
backend: reference
precision: fp32
shapes: {batch: 1, height: 64, width: 64}
samplers: [ddim]
sampler_steps: [1, 4]
defaults: {num_inference_steps: 4, guidance_scale: 3.0}
calibrate: {images: 4, num_inference_steps: 2, max_samples: 4}
components:
  unet: {widths: {w75: {channels: {ratio: 0.5, layers: ["mid_block.*"]}}}}
  unet_w75: {backend: onnxruntime}
verify: {num_inference_steps: 2, prompts: [a large green star on a white background]}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    place = Place(tmp_path_factory.mktemp("slim"), RECIPE)
    place.build()
    return place


def manifest(place: Place) -> dict:
    return json.loads((place.bundle() / "manifest.json").read_text())


def test_each_width_is_verified_and_told_of(built):
    told, reports = manifest(built), json.loads((built.bundle() / "reports" / "verify.json").read_text())["reports"]
    for name in ("unet", "unet_w75"):
        assert told["components"][name]["verification"]["passed"]
        assert reports[name]["component"] == name
    assert reports["unet_w75"]["own"]["worst"]["snr_db"] > 80, "to the module it was made of"
    assert 3 < reports["unet_w75"]["worst"]["snr_db"] < 60, "to the source"
    assert [effect["pass"] for effect in told["components"]["unet_w75"]["effects"]] == ["channels"]
    profiles = json.loads((built.bundle() / "profiles.json").read_text())
    assert profiles["profiles"]["draft"]["unet_width"] == "w75"
    assert {"battery_below": 0.2, "profile": "draft"} in profiles["policy"]


def made_by(built: Place, step: str) -> Path:
    """The folder in the store that `step` made."""
    found = (built.folder / "store").rglob("artifact.json")
    return next(path.parent for path in found if json.loads(path.read_text())["step"] == step)


def picture(built: Place, denoiser=None, **options) -> np.ndarray:
    """The picture of one request; `denoiser` in place of the bundle's."""
    import sdcompile

    with sdcompile.load(built.bundle()) as pipe:
        own = pipe._open_engine
        pipe._open_engine = lambda name: denoiser if denoiser and name.startswith("unet") else own(name)
        return pipe("a large red circle", seed=5, output_type="np", **options).images[0]


def torch_engine(built: Place, step: str, folder):
    """The pruned module that `step` left, run by torch."""
    from sdcompile.backends import BACKENDS, Host
    from sdcompile.backends.base import read_card
    from sdcompile.spec import Job

    card = read_card(built.bundle() / "components" / "unet", "reference")
    folder.mkdir()
    job = Job(card.component, card.params, "fp32", card.spec, card.shapes)
    BACKENDS["reference"].build(made_by(built, step), folder, job)
    return BACKENDS["reference"].open(folder, Host())


def test_a_picture_of_a_width_is_what_torch_draws_with_that_widths_module(built, tmp_path):
    from sdcompile.metrics import psnr_db

    expected = picture(built, torch_engine(built, "unet_w75.prune.channels", tmp_path / "engine"))
    assert psnr_db(expected, picture(built, unet_width="w75")) > 60
    assert psnr_db(expected, picture(built, unet_width="full")) < 40, "the wrong engine would be seen"


def test_generate_and_inspect_know_of_widths(built):
    from PIL import Image

    made = built.folder / "made"
    built.run("generate", built.bundle(), "a red circle", "--seed", "1", "--unet-width", "w75", "--output", made)
    (path,) = made.glob("*.png")
    assert Image.open(path).text["unet_width"] == "w75"
    assert "widths    full, w75" in built.run("inspect", built.bundle()).stdout


def test_a_finished_bundle_is_verified_again_with_every_width(built):
    from sdcompile import bundle
    from sdcompile.steps.verify import recheck

    samples = made_by(built, "pipeline.verify.record")
    reports = recheck(built.bundle(), bundle.read(built.bundle()), samples)
    assert set(reports) == {"text_encoder", "unet", "vae_decoder", "unet_w75", "pipeline"}
    assert all(report["passed"] for report in reports.values())
    assert reports["unet_w75"]["component"] == "unet_w75"
    assert reports["unet_w75"]["worst"]["snr_db"] < 60 < reports["unet"]["worst"]["snr_db"]
