"""The shipped weights: they load in plain diffusers, draw what they are told, and can be broken."""

import copy
import json

import numpy as np
import pytest

from sdcompile.models import tiny

pytestmark = pytest.mark.tiny

# Measured by scripts/tiny_figures.py on 200 prompts, less a margin for 20 prompts, 6 steps and other machines.
LEAST_SCORE = 0.80
GUIDANCE = 2.0


@pytest.fixture(scope="module")
def pipe():
    pytest.importorskip("torch")
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny.path())
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def prompts():
    return tiny.prompts(20, 21)


def scores(pipe, prompts) -> list[float]:
    import torch

    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    images = pipe(prompts, num_inference_steps=6, guidance_scale=GUIDANCE, generator=seeds, output_type="np").images
    return [tiny.alignment(image, prompt) for image, prompt in zip(images, prompts, strict=True)]


@pytest.fixture(scope="module")
def whole_scores(pipe, prompts):
    return scores(pipe, prompts)


def test_the_shipped_weights_draw_what_they_are_told(whole_scores):
    assert np.mean(whole_scores) >= LEAST_SCORE


def test_broken_weights_fall_clearly(pipe, prompts, whole_scores):
    import torch

    whole, broken = pipe.unet, copy.deepcopy(pipe.unet)
    with torch.no_grad():
        for layer in broken.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3):
                strength = layer.weight.abs().sum((1, 2, 3))
                layer.weight[strength < strength.median()] = 0
    pipe.unet = broken
    try:
        assert np.mean(scores(pipe, prompts[:10])) <= np.mean(whole_scores[:10]) - 0.25
    finally:
        pipe.unet = whole


def test_the_folder_is_small_and_in_half_precision():
    data = [file for file in tiny.path().rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")]
    assert sum(file.stat().st_size for file in data) <= 12_000_000
    weights = [file for file in data if file.suffix == ".safetensors"]
    assert len(weights) == 4
    for file in weights:
        raw = file.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F16"}


def test_the_text_encoder_s_weights_are_named_as_published_ones_are():
    raw = (tiny.path() / "text_encoder" / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert all(name.startswith("text_model.") for name in header if name != "__metadata__")


def test_the_unet_is_of_sd_s_kind_and_prunable(pipe):
    config = pipe.unet.config
    assert sum("CrossAttn" in name for name in config.down_block_types) >= 2
    assert config.attention_head_dim >= 4  # the number of heads, in SD 1.x's reading
    assert all(width % 16 == 0 for width in config.block_out_channels)
    assert pipe.vae.config.scaling_factor == 0.18215
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_every_word_is_one_token(pipe):
    for prompt in tiny.prompts(50, 3, split="train"):
        words = prompt.replace(",", " ,").split()
        ids = pipe.tokenizer(prompt).input_ids
        assert len(ids) == len(words) + 2
        assert max(ids) < pipe.text_encoder.config.vocab_size


def test_other_sizes_run(pipe):
    image = pipe(tiny.prompts(1, 0), num_inference_steps=2, height=80, width=64, output_type="np").images[0]
    assert image.shape == (80, 64, 3)
    assert np.isfinite(image).all()


def test_the_light_decoder_reads_the_same_latents(pipe):
    import torch
    from diffusers import AutoencoderTiny

    from sdcompile.models.tiny import scenes

    light = AutoencoderTiny.from_pretrained(tiny.path() / "vae_light")
    rng = np.random.default_rng(1)
    drawn = np.stack([scenes.draw(scenes.sample_scene(rng, "held_out"), rng) for _ in range(8)])
    pictures = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pictures).latent_dist.mode()
        full = pipe.vae.decode(latents).sample
        quick = light.decode(latents * pipe.vae.config.scaling_factor).sample

    def psnr_db(decoded) -> float:
        return float(10 * torch.log10(4 / (decoded.clamp(-1, 1) - pictures).square().mean()))

    assert psnr_db(full) >= 30
    assert psnr_db(quick) >= 25
