"""Family sd: what it reads from configs, which sizes it takes, what it refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from sdcompile.errors import RecipeError
from sdcompile.families import FAMILIES, sd
from sdcompile.spec import Range

CONFIGS = {
    "unet": {
        "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "sample_size": 64,
        "cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280],
    },
    "vae": {
        "_class_name": "AutoencoderKL", "latent_channels": 4, "out_channels": 3,
        "block_out_channels": [128, 256, 512, 512],
    },
    "text_encoder": {"architectures": ["CLIPTextModel"], "hidden_size": 768, "max_position_embeddings": 77},
    "scheduler": {"prediction_type": "epsilon"},
}  # fmt: skip
FAMILY = FAMILIES["sd"]


def configs(**changes: object) -> dict:
    """SD 1.5's configs with `folder__field=value` changes."""
    made = copy.deepcopy(CONFIGS)
    for place, value in changes.items():
        folder, _, field = place.partition("__")
        made[folder][field] = value
    return made


def test_sd15_has_the_inputs_diffusers_gives_it():
    specs = FAMILY.components(configs())
    assert [t.name for t in specs["unet"].inputs] == ["sample", "timestep", "encoder_hidden_states"]
    assert specs["unet"].inputs[2].dims == ("R", "T", 768)
    assert specs["vae_decoder"].outputs[0].dims == ("B", 3, "H", "W")


def test_an_lcm_unet_takes_the_guidance_embedding():
    specs = FAMILY.components(configs(unet__time_cond_proj_dim=256))
    assert specs["unet"].inputs[-1].name == "timestep_cond"
    assert specs["unet"].inputs[-1].dims == ("R", 256)


def test_sizes_left_open_are_the_models_own():
    shapes = FAMILY.shapes({}, configs())
    assert shapes["H"] == Range(512, 512, 512)
    assert shapes["h"] == Range(64, 64, 64)
    assert shapes["T"] == Range(77, 77, 77)


def test_guidance_doubles_the_rows_but_never_the_smallest():
    assert FAMILY.shapes({"batch": (1, 2, 4)}, configs())["R"] == Range(1, 4, 8)


def test_every_illegal_size_is_named_with_its_neighbours():
    with pytest.raises(RecipeError) as caught:
        FAMILY.shapes({"height": (480, 500, 520), "width": (64, 512, 512), "tokens": (77, 77, 100)}, configs())
    text = caught.value.message
    assert "shapes.height: 480 is not a multiple of 64 (nearest: 448, 512)" in text
    assert "shapes.height: 500" in text
    assert "shapes.tokens: 100 is not a multiple of the text encoder's 77" in text
    assert "shapes.width" not in text


def test_the_scaling_factor_comes_from_the_config():
    assert FAMILY.facts(configs(vae__scaling_factor=0.43, vae__shift_factor=0.1))["scaling_factor"] == 0.43
    assert FAMILY.facts(configs(vae__scaling_factor=0.43, vae__shift_factor=0.1))["shift_factor"] == 0.1
    assert FAMILY.facts(configs())["scaling_factor"] == 0.18215


TAESD = {
    "_class_name": "AutoencoderTiny", "latent_channels": 4, "out_channels": 3, "num_decoder_blocks": [3, 3, 3, 1],
}  # fmt: skip


def test_a_decoder_of_another_source_has_a_scale_of_its_own():
    with_taesd = {**configs(vae__scaling_factor=0.2), "vae_decoder": TAESD}
    assert FAMILY.facts(with_taesd)["decoder"] == {"scaling_factor": 1.0, "shift_factor": 0.0}
    assert FAMILY.facts(with_taesd)["scaling_factor"] == 0.2, "latents stay those of the model's own VAE"
    assert "decoder" not in FAMILY.facts(configs())
    other = {**configs(), "vae_decoder": {**CONFIGS["vae"], "scaling_factor": 0.5}}
    assert FAMILY.facts(other)["decoder"]["scaling_factor"] == 0.5
    assert FAMILY.replaceable["vae_decoder"](with_taesd) == []
    assert FAMILY.replaceable["vae_decoder"](other) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_channels": 16}, ["it has 16 latent channels, where this model has 4"]),
        ({"num_decoder_blocks": [3, 1]}, ["it has 2 pixels a latent along each side, where this model has 8"]),
        ({"out_channels": 4, "latent_channels": 1}, ["it has 1 latent channels", "it has 4 channels of a picture"]),
        ({"_class_name": "AutoencoderDC"}, ["it holds a AutoencoderDC; a decoder is an AutoencoderKL or an"]),
    ],
)
def test_a_decoder_of_another_shape_is_refused(changes, words):
    faults = FAMILY.replaceable["vae_decoder"]({**configs(), "vae_decoder": {**TAESD, **changes}})
    assert len(faults) == len(words)
    assert all(word in fault for word, fault in zip(words, faults, strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unet__addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
        ({"unet__in_channels": 9}, "9 channels but the VAE makes 4"),
        ({"unet__cross_attention_dim": 1024}, "768 wide but the UNet attends to 1024"),
        ({"vae___class_name": "AutoencoderTiny"}, "vae is a AutoencoderTiny"),
        ({"text_encoder__architectures": ["T5EncoderModel"]}, "text_encoder is a T5EncoderModel"),
        ({"unet__cross_attention_dim": [768, 1024]}, "different cross_attention_dim"),
    ],
)
def test_models_of_another_kind_are_refused_with_the_reason(changes, words):
    with pytest.raises(RecipeError) as caught:
        FAMILY.components(configs(**changes))
    assert words in caught.value.message


def test_models_without_a_guidance_embedding_get_no_extra_feed():
    assert sd.guidance_feeds({"time_cond_proj_dim": None}, 7.5, 2) == {}


def test_the_guidance_embedding_is_a_row_per_sample_and_depends_on_the_scale():
    low, high = (sd.guidance_feeds({"time_cond_proj_dim": 256}, g, 3)["timestep_cond"] for g in (2.0, 8.0))
    assert low.shape == (3, 256)
    assert low.dtype == np.float32
    assert not np.allclose(low, high)
    assert np.array_equal(low[0], low[2])
