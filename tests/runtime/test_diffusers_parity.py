"""The pipeline against diffusers' StableDiffusionPipeline: same weights, same seed, same picture."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import sdcompile.models.tiny as tiny
from sdcompile.bundle import Defaults
from sdcompile.errors import BundleError
from sdcompile.families import FAMILIES
from sdcompile.runtime import SdcompileWarning
from sdcompile.runtime.model import Model
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.samplers import SAMPLERS
from sdcompile.spec import Job, Range

pytestmark = [pytest.mark.tiny, pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")]

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# The largest difference of a pixel in [0, 1]; float32 sums taken in another order.
PARITY = 1e-4
SCHEDULER = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False,
}  # fmt: skip
CHOSEN = ("ddim", "pndm", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm", "tcd")


class TorchEngine:
    inputs = outputs = ()
    facts: Mapping[str, Any] = {}

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.name, self.run = name, run

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {self.name: self.run(**{k: torch.tensor(v) for k, v in feeds.items()}).numpy()}

    def close(self) -> None:
        pass


def theirs(embedding: int | None) -> Any:
    """A diffusers pipeline with seeded random weights, `embedding` wide where it takes the guidance scale as input."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(tiny.__file__).parent / "tokenizer")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), time_cond_proj_dim=embedding,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16), norm_num_groups=8, layers_per_block=1, latent_channels=4, scaling_factor=0.3,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae.eval(), text_encoder.eval(), tokenizer, unet.eval(), diffusers.PNDMScheduler.from_config(SCHEDULER),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(pipeline: Any, folder: Path) -> Pipeline:
    """The same modules as engines, behind tokenizer and tables made by the compiler's own steps."""
    from sdcompile.steps import sampler, tokenizer

    torch.set_num_threads(1)  # these modules are too small to share
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    text = json.dumps({"_class_name": "PNDMScheduler", **SCHEDULER})
    (folder / "scheduler" / "scheduler_config.json").write_text(text, encoding="utf-8")
    pipeline.scheduler_of_the_source = diffusers.PNDMScheduler.from_pretrained(folder / "scheduler")
    for made in ("ids", "tables"):
        (folder / made).mkdir()
    tokenizer.run({"source": folder}, folder / "ids", Job("tokenizer"))
    rows = [{"name": n, "scheduler": SAMPLERS[n].scheduler, "config": dict(SAMPLERS[n].config)} for n in CHOSEN]
    sampler.run({"source": folder}, folder / "tables", Job("samplers", {"samplers": rows, "num_inference_steps": [6]}))
    configs = {
        "unet": dict(pipeline.unet.config), "vae": dict(pipeline.vae.config),
        "text_encoder": pipeline.text_encoder.config.to_dict(), "scheduler": SCHEDULER,
    }  # fmt: skip
    family = FAMILIES["sd"]
    ranges = {"batch": (1, 1, 2), "height": (16, 16, 32), "width": (16, 16, 32)}
    shapes = dict(family.shapes(ranges, configs))
    assert shapes["R"] == Range(1, 2, 4)
    defaults = Defaults(sampler="ddim", num_inference_steps=6, guidance_scale=7.5, height=16, width=16)
    model = Model.from_parts("toy", "sd", family.facts(configs), shapes, folder / "ids", folder / "tables", defaults)
    runs = {
        "text_encoder": ("last_hidden_state", lambda input_ids: pipeline.text_encoder(input_ids)[0]),
        "unet": ("out_sample", lambda **feeds: pipeline.unet(**feeds, return_dict=False)[0]),
        "vae_encoder": ("latent_parameters", lambda sample: pipeline.vae.encode(sample).latent_dist.parameters),
        "vae_decoder": ("sample", lambda latent_sample: pipeline.vae.decode(latent_sample, return_dict=False)[0]),
    }
    return Pipeline(model, lambda component: TorchEngine(*runs[component]))


@pytest.fixture(scope="module", params=[None, 16], ids=["guided twice", "guidance embedded"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Pipeline]:
    pipeline = theirs(request.param)
    return pipeline, ours(pipeline, tmp_path_factory.mktemp("toy"))


def switch(pipeline: Any, name: str) -> None:
    """Switch schedulers as diffusers users do, always from the one the source came with."""
    row, config = SAMPLERS[name], pipeline.scheduler_of_the_source.config
    pipeline.scheduler = getattr(diffusers, row.scheduler).from_config(config, **row.config)


def pictures(
    both: tuple[Any, Pipeline], name: str, prompt: Any, seed: int = 4, **arguments: Any
) -> tuple[np.ndarray, np.ndarray]:
    pipeline, pipe = both
    switch(pipeline, name)
    generator = torch.Generator("cpu").manual_seed(seed)
    options = {"num_inference_steps": 6, "output_type": "np", **arguments}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SdcompileWarning)
        found = pipe(prompt, seed=seed, sampler=name, **options).images
    with torch.inference_mode():
        expected = pipeline(prompt, generator=generator, **{"height": 16, "width": 16, **options}).images
    return found, expected


@pytest.mark.parametrize("name", CHOSEN)
def test_the_same_seed_gives_the_picture_of_diffusers(both: tuple[Any, Pipeline], name: str) -> None:
    found, expected = pictures(both, name, "a red circle above a blue square")
    assert np.abs(found - expected).max() <= PARITY


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": ["a red circle", ""], "negative_prompt": ["blue", "a square"], "num_images_per_prompt": 2},
        {"prompt": "a red circle", "guidance_scale": 1.0},
        {"prompt": "a red circle", "guidance_scale": 2.5, "height": 32, "width": 16},
        {"prompt": "circle " * 500},
    ],
    ids=["batches", "unguided", "another size", "cut prompt"],
)
@pytest.mark.parametrize("name", ["dpmpp_2m", "euler_ancestral"])
def test_every_kind_of_request_gives_the_pictures_of_diffusers(
    both: tuple[Any, Pipeline], name: str, arguments: dict[str, Any]
) -> None:
    found, expected = pictures(both, name, **arguments)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= PARITY


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc", "heun", "euler_ancestral"])
def test_latents_replaced_by_a_callback_give_the_picture_of_diffusers(both: tuple[Any, Pipeline], name: str) -> None:
    def halve(pipeline: Any, step: int, timestep: Any, arrays: dict[str, Any]) -> dict[str, Any]:
        return {"latents": arrays["latents"] * 0.5} if step == 2 else {}

    found, expected = pictures(both, name, "a red circle", callback_on_step_end=halve)
    assert np.abs(found - expected).max() <= PARITY
    assert np.abs(found - pictures(both, name, "a red circle")[0]).max() > PARITY


def test_latents_may_be_given_as_to_diffusers(both: tuple[Any, Pipeline]) -> None:
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    pipeline, pipe = both
    found = pipe("a red circle", latents=noise, sampler="euler", output_type="np").images
    switch(pipeline, "euler")
    with torch.inference_mode():
        expected = pipeline(
            "a red circle", latents=torch.from_numpy(noise), num_inference_steps=6, output_type="np"
        ).images
    assert np.abs(found - expected).max() <= PARITY


def drawing(height: int = 16, width: int = 16) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows / height, columns / width, (rows + columns) % 7 / 7], axis=-1).astype(np.float32)


def from_a_picture(
    both: tuple[Any, Pipeline], name: str, prompt: Any, seed: Any = 4, **arguments: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Ours and diffusers' img2img, or inpainting where a mask is given."""
    pipeline, pipe = both
    switch(pipeline, name)
    inpainting = "mask_image" in arguments
    kind = diffusers.StableDiffusionInpaintPipeline if inpainting else diffusers.StableDiffusionImg2ImgPipeline
    other = kind(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = PIL.Image.fromarray((drawing() * 255).astype(np.uint8))
    options = {"num_inference_steps": 6, "output_type": "np", "image": image, **arguments}
    found = pipe(prompt, seed=seed, sampler=name, **options).images
    seeds = [torch.Generator("cpu").manual_seed(s) for s in seed] if isinstance(seed, list) else None
    with torch.inference_mode():
        expected = other(
            prompt, generator=seeds or torch.Generator("cpu").manual_seed(seed), **options,
            **({"height": 16, "width": 16} if inpainting else {}),
        ).images  # fmt: skip
    return found, expected


BEGIN_LATER = tuple(name for name in CHOSEN if name not in ("pndm", "unipc"))


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", BEGIN_LATER)
def test_a_picture_to_start_from_gives_the_picture_of_diffusers(
    both: tuple[Any, Pipeline], name: str, strength: float
) -> None:
    found, expected = from_a_picture(both, name, "a red circle", strength=strength)
    assert np.abs(found - expected).max() <= PARITY
    assert np.abs(found - from_a_picture(both, name, "a red circle", strength=0.8)[0]).max() > PARITY


@pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning")
@pytest.mark.parametrize("seed", [4, [5, 6]], ids=["one seed", "a seed each"])
@pytest.mark.parametrize("masked", [False, True])
def test_batches_from_one_picture_are_those_of_diffusers(both: tuple[Any, Pipeline], seed: Any, masked: bool) -> None:
    # diffusers' inpainting draws for as many pictures as it is given; with one each, every image can be made alone.
    each = [PIL.Image.fromarray((drawing() * 255).astype(np.uint8))] * 2
    options = {"mask_image": mask(), "image": each} if masked else {}
    found, expected = from_a_picture(
        both, "euler_ancestral", ["a red circle", ""], seed=seed, strength=0.7, guidance_scale=2.0, **options
    )
    assert np.abs(found - expected).max() <= PARITY


def mask() -> Any:
    levels = np.zeros((16, 16), np.uint8)
    levels[:, 8:] = 255
    return PIL.Image.fromarray(levels)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", ["ddim", "euler", "euler_ancestral", "dpmpp_2m", "lcm"])
def test_inpainting_gives_the_picture_of_diffusers(both: tuple[Any, Pipeline], name: str, strength: float) -> None:
    found, expected = from_a_picture(both, name, "a red circle", strength=strength, mask_image=mask())
    assert np.abs(found - expected).max() <= PARITY
    everything = from_a_picture(both, name, "a red circle", strength=strength)[0]
    assert np.abs(found - everything).max() > PARITY


def test_rescaled_guidance_gives_the_picture_of_diffusers(both: tuple[Any, Pipeline]) -> None:
    found, expected = pictures(both, "ddim", "a red circle", guidance_rescale=0.7)
    assert np.abs(found - expected).max() <= PARITY


def test_samplers_that_look_far_back_cannot_begin_later(both: tuple[Any, Pipeline]) -> None:
    with pytest.raises(BundleError, match="unipc cannot begin at a later step"):
        both[1]("a red circle", image=drawing(), sampler="unipc")


def test_another_seed_does_not_give_the_picture_of_diffusers(both: tuple[Any, Pipeline]) -> None:
    pipe = both[1]
    _, expected = pictures(both, "ddim", "a red circle", seed=4)
    found = pipe("a red circle", seed=5, sampler="ddim", output_type="np").images
    assert np.abs(found - expected).max() > PARITY


def with_tiny_decoder(both: tuple[Any, Pipeline], scaling_factor: float) -> tuple[Any, Pipeline]:
    """Both with an AutoencoderTiny in place of the VAE: diffusers' by assignment, ours by its facts."""
    torch.manual_seed(1)
    pipeline, pipe = both
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), scaling_factor=scaling_factor,
    )  # fmt: skip
    other = diffusers.StableDiffusionPipeline(
        **{**pipeline.components, "vae": vae.eval()}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    other.scheduler_of_the_source = pipeline.scheduler_of_the_source
    decode = TorchEngine("sample", lambda latent_sample: vae.decode(latent_sample, return_dict=False)[0])
    scale = {"scaling_factor": scaling_factor, "shift_factor": 0.0}
    model = replace(pipe.model, facts={**pipe.model.facts, "decoder": scale})
    return other, Pipeline(model, lambda name: decode if name == "vae_decoder" else pipe._open_engine(name))


@pytest.mark.parametrize("scaling_factor", [1.0, 0.7])
def test_another_decoder_gives_the_picture_that_diffusers_gives_with_it(
    both: tuple[Any, Pipeline], scaling_factor: float
) -> None:
    other, pipe = with_tiny_decoder(both, scaling_factor)
    found, expected = pictures((other, pipe), "dpmpp_2m", "a red circle")
    assert np.abs(found - expected).max() <= PARITY
    without = {name: value for name, value in pipe.model.facts.items() if name != "decoder"}
    pipe.model = replace(pipe.model, facts=without)
    wrong, _ = pictures((other, pipe), "dpmpp_2m", "a red circle")
    assert np.abs(wrong - expected).max() > 100 * PARITY, "the VAE's own scale is not this decoder's"
