"""Several widths of one denoiser at run time: which engine makes an image, which is never opened, who chooses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from sdcompile.errors import BundleError, RecipeError
from sdcompile.runtime import promptfiles
from sdcompile.runtime.model import Model
from sdcompile.runtime.offer import Offer
from sdcompile.runtime.options import Options
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.runtime.profiles import FILE, read
from sdcompile.runtime.request import resolve, second_pass
from tests.runtime.test_pipeline import Engines, _Engine, model_in


class Slim(Engines):
    """A denoiser whose narrower widths answer a little less than the full one."""

    def __call__(self, component: str) -> _Engine:
        super().__call__(component)
        return _SlimEngine(self, component)


class _SlimEngine(_Engine):
    def _unet_w75(self, feeds):
        return self._unet(feeds) * np.float32(0.75)

    def _unet_w50(self, feeds):
        return self._unet(feeds) * np.float32(0.5)


COMPONENTS = ("text_encoder", "unet", "vae_decoder", "unet_w75", "unet_w50")
OFFER = Offer({"ddim": (1, 2, 4)}, "ddim", 4, ("full", "w75", "w50"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return replace(model_in(tmp_path_factory.mktemp("model")), components=COMPONENTS)


@pytest.fixture
def engines() -> Slim:
    return Slim()


def with_default(model: Model, width: str) -> Model:
    return replace(model, defaults=model.defaults.model_copy(update={"options": {"unet_width": width}}))


def test_the_asked_width_alone_is_opened_and_makes_the_image(model, engines):
    pipe = Pipeline(model, engines)
    narrow = pipe("red", seed=1, unet_width="w50", output_type="latent")
    assert "unet" not in engines.open
    assert engines.open == ["text_encoder", "unet_w50"]
    assert len(engines.rows["unet_w50"]) == 4
    assert narrow.request.unet_width == narrow.metadata(0)["unet_width"] == "w50"
    full = pipe("red", seed=1, output_type="latent")
    assert full.request.unet_width == "full"
    assert "unet_width" not in full.metadata(0)
    assert not np.array_equal(full.images, narrow.images)
    np.testing.assert_array_equal(pipe("red", seed=1, unet_width="full", output_type="latent").images, full.images)


def test_an_engine_of_another_width_would_be_seen(model):
    class Wrong(Slim):
        def __call__(self, component):
            return super().__call__("unet" if component == "unet_w50" else component)

    right, wrong = (
        Pipeline(model, made)("red", seed=1, unet_width="w50", output_type="latent").images
        for made in (Slim(), Wrong())
    )
    assert not np.allclose(right, wrong)


def test_both_passes_of_a_large_image_have_the_asked_width(model):
    first = resolve(model, "red", Options(hires=1.5, height=32, width=32, unet_width="w75"))
    assert second_pass(first, model, None).unet_width == "w75"


def test_with_low_memory_one_engine_is_open_whatever_the_width(model, engines):
    pipe = Pipeline(model, engines, low_memory=True)
    for width in ("full", "w75", "w50"):
        pipe("red", seed=1, unet_width=width)
    assert engines.most_open == 1


def test_a_width_the_bundle_lacks_is_refused_with_those_it_has(model, engines):
    pipe = Pipeline(model, engines)
    with pytest.raises(BundleError) as caught:
        pipe("red", unet_width="w7")
    assert "'w7' is not one of its widths (full, w75, w50), did you mean 'w75'?" in caught.value.message
    assert "components.unet.widths.w7=" in caught.value.hint
    alone = Pipeline(replace(model, components=COMPONENTS[:3]), engines)
    with pytest.raises(BundleError, match=r"\(full\)"):
        alone("red", unet_width="w75")
    with pytest.raises(RecipeError, match=r"unet_width=0\.75 is no name of a width"):
        pipe("red", unet_width=0.75)
    assert not engines.open


def test_the_bundles_default_is_what_an_open_request_gets_and_what_is_warmed_up(model, engines):
    pipe = Pipeline(with_default(model, "w75"), engines)
    pipe.warm_up()
    assert set(engines.rows) == {"text_encoder", "unet_w75", "vae_decoder"}
    assert pipe("red", seed=1).request.unet_width == "w75"
    assert pipe("red", seed=1, unet_width="full").request.unet_width == "full"


def test_a_low_battery_chooses_the_narrow_width_by_its_profile(model, engines, tmp_path):
    content = {"profiles": {"draft": {"unet_width": "w50"}}, "policy": [{"battery_below": 0.2, "profile": "draft"}]}
    (tmp_path / FILE).write_text(json.dumps(content))
    pipe = Pipeline(replace(model, profiles=read(tmp_path, OFFER)), engines)
    pipe.power_state = lambda: {"battery": 0.1}
    assert pipe("red", seed=1).request.unet_width == "w50"
    pipe.power_state = lambda: {"battery": 0.9}
    assert pipe("red", seed=1).request.unet_width == "full"
    assert pipe("red", seed=1, profile="draft", unet_width="w75").request.unet_width == "w75"


def test_a_profile_that_asks_for_a_width_the_bundle_lacks_is_refused_when_it_is_opened(tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"profiles": {"draft": {"unet_width": "w60"}}}))
    with pytest.raises(BundleError, match="profile draft: unet_width: 'w60' is not one of its widths"):
        read(tmp_path, OFFER)
    assert read(tmp_path, replace(OFFER, widths=None)).named("draft") == Options(unet_width="w60")


def test_kept_images_are_those_of_their_width(model, engines, tmp_path):
    pipe = Pipeline(model, engines)
    pipe.keep_images(tmp_path, 1 << 20)
    for width, read_back in (("full", 0), ("w50", 0), ("w50", 1)):
        assert pipe("red", seed=1, unet_width=width).timings["images_read"] == read_back


def test_a_row_of_a_prompt_file_may_name_its_width(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,unet_width\nred,w50\nblue,\n")
    assert [row.options.unet_width for row in promptfiles.read(tmp_path / "rows.csv")] == ["w50", None]
