"""The pipeline on engines written here in numpy: requests, batches, guidance, callbacks, memory, errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdcompile.bundle import Defaults, SamplerEntry, TokenizerEntry
from sdcompile.errors import BundleError, RecipeError, StageError
from sdcompile.runtime import SdcompileWarning
from sdcompile.runtime.model import Model
from sdcompile.runtime.noise import randn
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.runtime.tables import NOISE, OUTPUT, STATE, Call, Table, Term, save
from sdcompile.spec import Range

FACTS = {
    "latent_channels": 4, "vae_scale_factor": 8, "size_multiple": 16, "scaling_factor": 0.5, "shift_factor": 0.25,
    "tokens": 6, "prediction_type": "epsilon", "time_cond_proj_dim": None,
}  # fmt: skip
SHAPES = {
    "B": Range(1, 1, 3), "R": Range(1, 2, 4), "T": Range(6, 6, 6), "H": Range(32, 32, 64), "W": Range(32, 32, 64),
    "h": Range(4, 4, 8), "w": Range(4, 4, 8),
}  # fmt: skip
DETERMINISTIC = tuple(Call(900.0 - 100 * i, 1.0, 0, (Term(STATE, 0, 0.9), Term(OUTPUT, 0, -0.1))) for i in range(4))
STOCHASTIC = tuple(replace(call, draws=1, terms=(*call.terms, Term(NOISE, 0, 0.2))) for call in DETERMINISTIC)


class Engines:
    """Opens numpy engines whose output rows depend on their own input rows only, and records every call."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}
        self.feeds: dict[str, list[dict[str, np.ndarray]]] = {}
        self.open: list[str] = []
        self.most_open = 0
        self.poison: str | None = None

    def __call__(self, component: str) -> _Engine:
        self.open.append(component)
        self.most_open = max(self.most_open, len(self.open))
        return _Engine(self, component)


class _Engine:
    inputs = outputs = ()
    facts: Mapping[str, Any] = {}

    def __init__(self, owner: Engines, component: str) -> None:
        self.owner, self.component = owner, component

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        first = next(iter(feeds.values()))
        assert all(len(array) == len(first) for array in feeds.values())
        limits = SHAPES["B" if self.component == "vae_decoder" else "R"]
        assert limits.min <= len(first) <= limits.max
        self.owner.rows.setdefault(self.component, []).append(len(first))
        self.owner.feeds.setdefault(self.component, []).append(dict(feeds))
        output = getattr(self, f"_{self.component}")(feeds)
        name = "last_hidden_state" if self.component == "text_encoder" else "out"
        return {name: output * np.float32(np.nan) if self.owner.poison == self.component else output}

    def _text_encoder(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        assert feeds["input_ids"].dtype == np.int64
        return np.repeat(feeds["input_ids"][..., None].astype(np.float32), 5, axis=-1)

    def _unet(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        assert feeds["timestep"].shape == (len(feeds["sample"]),)
        assert {array.dtype for array in feeds.values()} == {np.dtype(np.float32)}
        text = feeds["encoder_hidden_states"].mean(axis=(1, 2))[:, None, None, None]
        return np.tanh(feeds["sample"] * text) + feeds["timestep"][:, None, None, None] * np.float32(1e-4)

    def _vae_decoder(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.tanh(feeds["latent_sample"][:, :3].repeat(8, axis=2).repeat(8, axis=3))

    def close(self) -> None:
        self.owner.open.remove(self.component)


def model_in(folder: Path) -> Model:
    """A model whose tokenizer and tables are written into `folder`."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    words = {"<s>": 0, "</s>": 1, "red": 2, "blue": 3, "circle": 4, "?": 5}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    for name, calls in (("ddim", DETERMINISTIC), ("euler_ancestral", STOCHASTIC)):
        save(folder, name, [Table(name, n, 2.0, calls[:n]) for n in (1, 2, 4)])
    return Model(
        name="toy",
        family="sd",
        facts=FACTS,
        shapes=SHAPES,
        tokenizer=TokenizerEntry(file="tokenizer.json", max_length=6, pad_id=1, bos_id=0, eos_id=1),
        tokenizer_file=folder / "tokenizer.json",
        samplers={
            name: SamplerEntry(file=f"{name}.npz", scheduler="X", num_inference_steps=(1, 2, 4))
            for name in ("ddim", "euler_ancestral")
        },
        tables=folder,
        defaults=Defaults(sampler="ddim", num_inference_steps=4, guidance_scale=5.0, height=32, width=48),
        digest="d1",
    )


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return model_in(tmp_path)


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def pipe(model: Model, engines: Engines) -> Pipeline:
    return Pipeline(model, engines)


def test_a_call_with_a_prompt_alone_takes_the_models_defaults(pipe: Pipeline) -> None:
    made = pipe("red circle")
    assert [image.size for image in made.images] == [(48, 32)]
    assert (made.sampler, made.num_inference_steps) == ("ddim", 4)
    assert len(made.timings["denoise_s"]) == 4
    assert {"text_encoder_s", "denoise_s", "vae_s", "open_s"} <= set(made.timings)
    assert made.timings["denoise_rows"] == [2] * 4


def test_output_types_are_those_of_diffusers(pipe: Pipeline) -> None:
    pixels = pipe("red", seed=1, output_type="np").images
    assert (pixels.shape, pixels.dtype) == ((1, 32, 48, 3), np.float32)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert pipe("red", seed=1, output_type="latent").images.shape == (1, 4, 4, 6)


def test_the_vae_is_fed_unscaled_and_shifted_latents(pipe: Pipeline, engines: Engines) -> None:
    latents = pipe("red", seed=1, output_type="latent").images
    pipe("red", seed=1)
    np.testing.assert_allclose(engines.feeds["vae_decoder"][0]["latent_sample"], latents / 0.5 + 0.25, rtol=1e-6)


def test_the_same_seed_gives_the_same_picture_and_another_does_not(pipe: Pipeline) -> None:
    first, again, other = (pipe("red", seed=s, output_type="np").images for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_seed_that_was_not_given_is_told_and_repeats_the_picture(pipe: Pipeline) -> None:
    made = pipe("red", output_type="np", sampler="euler_ancestral")
    again = pipe("red", output_type="np", sampler="euler_ancestral", seed=made.seeds[0])
    assert np.array_equal(made.images, again.images)


def test_the_noise_of_a_seed_may_be_given_as_latents(pipe: Pipeline) -> None:
    noise = randn((1, 4, 4, 6), 9)
    assert np.array_equal(
        pipe("red", seed=9, output_type="np").images, pipe("red", latents=noise, output_type="np").images
    )


def test_guidance_denoises_negative_prompts_first_and_extrapolates(pipe: Pipeline, engines: Engines) -> None:
    pipe(["red", "blue"], negative_prompt=["circle", ""], seed=1, num_inference_steps=1, output_type="latent")
    ids = engines.feeds["unet"][0]["encoder_hidden_states"][:, 1, 0]
    assert ids.tolist() == [4, 1, 2, 3]
    noise = randn((2, 4, 4, 6), 1)
    plain = Pipeline(pipe.model, Engines())
    # One step of ddim's table by hand: 0.9 * s - 0.1 * (n + g (p - n))
    negative, positive = (
        (
            0.9 * 2 * noise
            - plain(p, latents=noise, guidance_scale=1, num_inference_steps=1, output_type="latent").images
        )
        * 10
        for p in (["circle", ""], ["red", "blue"])
    )
    guided = pipe(
        ["red", "blue"], negative_prompt=["circle", ""], seed=1, num_inference_steps=1, output_type="latent"
    ).images
    np.testing.assert_allclose(guided, 0.9 * 2 * noise - 0.1 * (negative + 5 * (positive - negative)), atol=2e-5)


@pytest.mark.parametrize("scale", [1.0, 0.0, -3.0])
def test_guidance_is_skipped_at_one_and_below(pipe: Pipeline, engines: Engines, scale: float) -> None:
    pipe("red", negative_prompt="circle", guidance_scale=scale)
    assert engines.rows["unet"] == [1] * 4
    assert np.ptp(engines.feeds["text_encoder"][0]["input_ids"], axis=0).max() == 0, "one prompt, twice"


def test_a_model_that_takes_the_guidance_scale_is_not_guided_twice(model: Model) -> None:
    engines = Engines()
    pipe = Pipeline(replace(model, facts={**FACTS, "time_cond_proj_dim": 8}), engines)
    pipe("red", guidance_scale=8.0, num_inference_steps=1)
    assert engines.rows["unet"] == [1]
    assert engines.feeds["unet"][0]["timestep_cond"].shape == (1, 8)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_a_batch_too_large_for_the_engines_gives_the_pictures_of_one_batch(
    model: Model, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = Engines()
    many = Pipeline(model, engines)(
        ["red", "blue"], num_images_per_prompt=4, seed=3, sampler=sampler, output_type="np"
    ).images
    assert max(engines.rows["unet"]) <= 4
    assert engines.rows["vae_decoder"] == [2, 3, 3]
    for letter in "BR":
        monkeypatch.setitem(SHAPES, letter, Range(1, 1, 99))
    together = Pipeline(replace(model, shapes=dict(SHAPES)), Engines())(
        ["red", "blue"], num_images_per_prompt=4, seed=3, sampler=sampler, output_type="np"
    )
    np.testing.assert_allclose(many, together.images, atol=1e-6)


def test_engines_built_for_a_larger_batch_are_fed_padded_rows(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Pipeline(model, Engines())("red", seed=1, guidance_scale=1, output_type="np").images
    for letter in "BR":
        monkeypatch.setitem(SHAPES, letter, Range(3, 3, 4))
    engines = Engines()
    found = Pipeline(replace(model, shapes=dict(SHAPES)), engines)(
        "red", seed=1, guidance_scale=1, output_type="np"
    ).images
    assert {rows for calls in engines.rows.values() for rows in calls} == {3}
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_one_seed_per_image_gives_each_the_picture_of_its_seed(pipe: Pipeline) -> None:
    both = pipe("red", num_images_per_prompt=2, seed=[5, 6], sampler="euler_ancestral", output_type="np").images
    for image, seed in zip(both, (5, 6), strict=True):
        np.testing.assert_allclose(
            image, pipe("red", seed=seed, sampler="euler_ancestral", output_type="np").images[0], atol=1e-6
        )


def test_a_prompt_met_before_is_not_encoded_again(pipe: Pipeline, engines: Engines) -> None:
    pipe(["red", "red", "blue"], negative_prompt="")
    assert len({row.tobytes() for feeds in engines.feeds["text_encoder"] for row in feeds["input_ids"]}) == 3
    before = len(engines.feeds["text_encoder"])
    pipe(["blue", "circle"], negative_prompt="red")
    (new,) = engines.feeds["text_encoder"][before:]
    assert len({row.tobytes() for row in new["input_ids"]}) == 1


def test_a_callback_is_told_every_step_and_may_replace_the_latents(pipe: Pipeline) -> None:
    told: list[tuple[int, float]] = []

    def callback(pipeline: Pipeline, step: int, timestep: float, arrays: dict[str, Any]) -> dict[str, Any] | None:
        assert pipeline is pipe
        told.append((step, timestep))
        return {"latents": np.zeros_like(arrays["latents"])} if step == 3 else None

    final = pipe("red", callback_on_step_end=callback, output_type="latent").images
    assert told == [(0, 900), (1, 800), (2, 700), (3, 600)]
    assert not final.any()
    with pytest.raises(RecipeError, match="gave back latents"):
        pipe("red", callback_on_step_end=lambda *_: {"latents": np.zeros((1, 2))})


def test_low_memory_keeps_one_engine_open_at_a_time(model: Model) -> None:
    low, high = Engines(), Engines()
    pictures = [
        Pipeline(model, engines, low_memory=engines is low)("red", seed=1, output_type="np").images
        for engines in (low, high)
    ]
    assert (low.most_open, high.most_open) == (1, 3)
    assert np.array_equal(*pictures)


def test_leaving_the_context_closes_every_engine(model: Model, engines: Engines) -> None:
    with Pipeline(model, engines) as pipe:
        pipe("red")
        assert len(engines.open) == 3
    assert engines.open == []


@pytest.mark.parametrize(
    ("component", "message"),
    [("text_encoder", "text encoder"), ("unet", "step 1 of 4"), ("vae_decoder", "decoded picture")],
)
def test_values_that_are_not_finite_are_an_error_and_never_a_picture(
    pipe: Pipeline, engines: Engines, component: str, message: str
) -> None:
    engines.poison = component
    with pytest.raises(StageError, match=message):
        pipe("red")


@pytest.mark.parametrize(
    ("arguments", "error", "message", "hint"),
    [
        ({"prompt": None}, RecipeError, "no prompt", "empty prompt is legal"),
        ({"prompt": []}, RecipeError, "list of prompts is empty", ""),
        ({"prompt": ["red", 3]}, RecipeError, "holds 3", ""),
        ({"prompt": ["red", "blue"], "negative_prompt": ["x"]}, RecipeError, "1 negative prompts .* 2 prompts", ""),
        ({"num_inference_steps": 0}, RecipeError, "at least 1", ""),
        ({"num_inference_steps": -4}, RecipeError, "-4", ""),
        ({"num_inference_steps": 2.5}, RecipeError, "no whole number", ""),
        ({"num_inference_steps": True}, RecipeError, "no whole number", ""),
        ({"num_inference_steps": 3}, RecipeError, "compiled for 1-2, 4 steps, not for 3", "sampler_steps"),
        ({"guidance_scale": float("nan")}, RecipeError, "not finite", ""),
        ({"guidance_scale": float("inf")}, RecipeError, "not finite", ""),
        ({"guidance_scale": "much"}, RecipeError, "no number", ""),
        ({"sampler": "dimm"}, RecipeError, "not in this model: it has ddim, euler_ancestral", "did you mean ddim"),
        ({"guidence_scale": 3}, RecipeError, "no option is called 'guidence_scale'", "did you mean guidance_scale"),
        ({"num_images_per_prompt": 0}, RecipeError, "at least 1", ""),
        ({"output_type": "jpeg"}, RecipeError, "jpeg", "pil, np, latent"),
        ({"seed": "one"}, RecipeError, "seed='one'", ""),
        ({"seed": [1, 2]}, RecipeError, "2 seeds .* 1 images", ""),
        ({"height": 40}, BundleError, "height 40 .* 32 to 64 in steps of 16", "width 48, height 32"),
        ({"width": 512}, BundleError, "width 512 .* 32 to 64", "width 64, height 32"),
        ({"height": -32}, BundleError, "height -32", "height 32"),
        ({"height": "big"}, RecipeError, "no whole number", ""),
        ({"latents": np.zeros((1, 4, 4))}, RecipeError, r"shape \(1, 4, 4\)", "one latent per 8 pixels"),
        ({"latents": np.zeros((2, 4, 4, 4))}, RecipeError, "1 image", ""),
        ({"latents": np.zeros((1, 4, 4, 4)), "height": 64}, RecipeError, "shape", ""),
        ({"latents": np.zeros((1, 4, 4, 4), np.int32)}, RecipeError, "int32", ""),
        ({"latents": np.full((1, 4, 4, 4), np.nan)}, RecipeError, "NaN", ""),
        ({"latents": np.zeros((1, 4, 5, 4))}, BundleError, "height 40", ""),
    ],
)
def test_a_bad_request_is_refused_with_what_is_wrong_and_what_to_do(
    pipe: Pipeline, engines: Engines, arguments: dict[str, Any], error: type[Exception], message: str, hint: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        pipe(**{"prompt": "red", **arguments})
    assert hint in caught.value.hint  # type: ignore[attr-defined]
    assert not engines.open


@pytest.mark.parametrize("prompt", ["", " ", "🦊", "一只猫", "red\x00blue\n"])
def test_strange_prompts_are_legal(pipe: Pipeline, prompt: str) -> None:
    assert len(pipe(prompt).images) == 1


def test_a_thousand_word_prompt_is_cut_with_a_warning(pipe: Pipeline) -> None:
    with pytest.warns(SdcompileWarning, match="6 tokens"):
        pipe("red " * 1000)


def test_the_metadata_of_a_picture_says_how_to_make_it_again(pipe: Pipeline) -> None:
    made = pipe(
        ["red", "blue"], negative_prompt="circle", seed=[3, 4], sampler="euler_ancestral", num_inference_steps=2
    )
    assert made.metadata(1) == {
        "prompt": "blue", "negative_prompt": "circle", "seed": "4", "index": "1", "batch": "2",
        "sampler": "euler_ancestral", "num_inference_steps": "2", "guidance_scale": "5", "size": "48x32",
        "model": "toy", "bundle": "d1",
    }  # fmt: skip


def test_generating_imports_none_of_the_compilers_libraries(tmp_path: Path) -> None:
    """In a fresh interpreter, with this file's engines."""
    program = f"""
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("engines", {str(Path(__file__))!r})
module = sys.modules["engines"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import sdcompile.runtime.opening
pipe = module.Pipeline(module.model_in(Path({str(tmp_path)!r})), module.Engines())
assert len(pipe("red", sampler="euler_ancestral").images) == 1
heavy = {{"torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "scipy", "nncf"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_text_encoder_is_called_in_one_shape_whatever_is_new(model: Model) -> None:
    engines = Engines()
    pipe = Pipeline(model, engines)
    alone = Pipeline(model, Engines()).embedder(["circle"])["encoder_hidden_states"]
    pipe("red", seed=1)
    pipe("blue", seed=1)
    pipe(["circle", "blue red", "?"], seed=1)
    pipe("red circle", seed=1, guidance_scale=1.0)
    assert engines.rows["text_encoder"] == [2] * 5, "1 + 1, 1, 3 and 1 new prompts"
    assert np.array_equal(pipe.embedder(["circle"])["encoder_hidden_states"], alone)


def test_a_model_without_guidance_encodes_its_prompts_one_by_one(model: Model) -> None:
    unguided = replace(model, defaults=model.defaults.model_copy(update={"guidance_scale": 1.0}))
    engines = Engines()
    Pipeline(unguided, engines)(["red", "blue"], seed=1)
    assert engines.rows["text_encoder"] == [1, 1]


def test_a_text_encoder_built_for_more_rows_gets_them(model: Model) -> None:
    engines = Engines()
    Pipeline(replace(model, shapes={**model.shapes, "R": Range(4, 4, 4)}), engines)("red", seed=1)
    assert engines.rows["text_encoder"] == [4]
