"""Compiled samplers against the diffusers schedulers they were read from."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdcompile.errors import RecipeError
from sdcompile.runtime.noise import Generator
from sdcompile.runtime.sampler import sample
from sdcompile.runtime.tables import NOISE, Table, Term, load, save
from sdcompile.samplers import SAMPLERS
from sdcompile.spec import Job

# The ignored warning is diffusers' own, on how its schedulers meet numpy 2.
pytestmark = [pytest.mark.tiny, pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")]

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
compiler = pytest.importorskip("sdcompile.steps.sampler")

PARITY = 1e-5
SHAPE = (2, 4, 6, 6)
STEPS = (1, 2, 7, 20)
SD15 = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "epsilon": {},
    "v_prediction": {"prediction_type": "v_prediction"},
    "karras": {"use_karras_sigmas": True},
    "trailing": {"timestep_spacing": "trailing"},
    "zero_snr": {
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    },
}  # fmt: skip


def bent_model(latents: np.ndarray, timestep: float) -> np.ndarray:
    """A denoiser that is linear in nothing."""
    return (0.3 * np.tanh(latents) + 0.6 * np.cos(timestep / 300) * latents).astype(np.float32)


@functools.cache
def prepared(scheduler: str, config: str) -> Any:
    """Some schedulers take half a second to set up."""
    return getattr(diffusers, scheduler).from_config(json.loads(config))


def by_diffusers(scheduler: str, config: dict[str, Any], steps: int, seed: int = 3, **options: Any) -> np.ndarray:
    """Final latents as StableDiffusionPipeline's loop makes them."""
    instance = copy.deepcopy(prepared(scheduler, json.dumps(config)))
    instance.set_timesteps(steps, device="cpu")
    generator = torch.Generator("cpu").manual_seed(seed)
    latents = torch.randn(SHAPE, generator=generator) * instance.init_noise_sigma
    taken = inspect.signature(instance.step).parameters
    options |= {"generator": generator} if "generator" in taken else {}
    options |= {"eta": options.get("eta", 0.0)} if "eta" in taken else {}
    for timestep in instance.timesteps:
        model_input = instance.scale_model_input(latents, timestep)
        output = torch.from_numpy(bent_model(model_input.numpy(), float(timestep)))
        latents = instance.step(output, timestep, latents, **options).prev_sample
    return latents.numpy()


def by_table(table: Table, seed: int = 3) -> np.ndarray:
    generator = Generator(seed)
    return sample(
        table,
        lambda x, index, images: bent_model(x, table.calls[index].timestep),
        generator.randn(SHAPE),
        lambda: generator.randn(SHAPE),
    )


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def tables(name: str, config: dict[str, Any], steps: tuple[int, ...] = STEPS) -> tuple[list[Table], dict[int, str]]:
    return compiler.tables_for(SAMPLERS[name].scheduler, config, SAMPLERS[name].config, steps, name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_table_samples_as_its_scheduler_does(name: str, variant: str) -> None:
    config = {**SD15, **VARIANTS[variant]}
    # A zero-SNR schedule starts Euler at sigma 4096, where the scheduler's own float32 latents are
    # spaced 5e-4 apart: see the next test for those.
    wide = variant == "zero_snr" and name in ("euler", "euler_ancestral")
    # Two-step KDPM2 with v-prediction cancels large terms in the scheduler's float32 (3.5e-5 off its float64 run).
    wide = wide or (variant == "v_prediction" and name == "kdpm2")
    compiled, left_out = tables(name, config)
    assert set(left_out) <= {1}
    for table in compiled:
        expected = by_diffusers(
            SAMPLERS[name].scheduler, {**config, **SAMPLERS[name].config}, table.num_inference_steps
        )
        assert relative_error(by_table(table), expected) <= (1e-3 if wide else PARITY), table.num_inference_steps


@pytest.mark.parametrize(
    ("name", "variant"),
    [("euler", "zero_snr"), ("euler_ancestral", "zero_snr"), ("kdpm2", "v_prediction"), ("euler", "epsilon")],
)
def test_where_float32_rounds_the_scheduler_the_table_follows_its_float64_run(
    name: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**SD15, **VARIANTS[variant]}
    to = torch.Tensor.to
    for table in tables(name, config)[0]:
        instance = getattr(diffusers, SAMPLERS[name].scheduler).from_config(config)
        instance.set_timesteps(table.num_inference_steps, device="cpu")
        generator = torch.Generator("cpu").manual_seed(3)
        latents = torch.randn(SHAPE, generator=generator).double() * instance.init_noise_sigma
        for timestep in instance.timesteps:
            output = torch.from_numpy(
                bent_model(instance.scale_model_input(latents, timestep).numpy(), float(timestep))
            )
            with monkeypatch.context() as patch:
                # The cast in `step` is the rounding in question.
                patch.setattr(torch.Tensor, "to", lambda x, *a, **k: x if a == (torch.float32,) else to(x, *a, **k))
                options = {"generator": generator} if "generator" in inspect.signature(instance.step).parameters else {}
                draw = lambda shape, generator, **_: torch.randn(shape, generator=generator).double()  # noqa: E731
                if table.lag(NOISE) >= 0:
                    patch.setattr(f"{type(instance).__module__}.randn_tensor", draw)
                latents = instance.step(output.double(), timestep, latents, **options).prev_sample
        assert relative_error(by_table(table), latents.numpy()) <= PARITY


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "euler_ancestral"])
def test_a_table_with_one_altered_coefficient_does_not_sample_as_its_scheduler(name: str) -> None:
    (table,), _ = tables(name, SD15, (12,))
    call = table.calls[5]
    term = call.terms[-1]
    altered = replace(call, terms=(*call.terms[:-1], Term(term.kind, term.lag, term.value * 1.01)))
    wrong = replace(table, calls=(*table.calls[:5], altered, *table.calls[6:]))
    expected = by_diffusers(SAMPLERS[name].scheduler, {**SD15, **SAMPLERS[name].config}, 12)
    assert relative_error(by_table(wrong), expected) > PARITY


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [("TCDScheduler", {"eta": 0.3}), ("DDIMScheduler", {"eta": 1.0}), ("EulerDiscreteScheduler", {"s_churn": 1.0})],
)
def test_options_of_the_schedulers_step_are_compiled_in(scheduler: str, settings: dict[str, Any]) -> None:
    (table,), _ = compiler.tables_for(scheduler, SD15, settings, [8])
    assert table.is_stochastic
    assert relative_error(by_table(table), by_diffusers(scheduler, SD15, 8, **settings)) <= PARITY


TELL_CLEAN = ("ddim", "ddpm", "lms", "euler", "euler_ancestral", "heun", "kdpm2", "kdpm2_ancestral")


@pytest.mark.parametrize("name", TELL_CLEAN)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_predicted_clean_latents_are_those_of_the_scheduler(name: str, prediction: str) -> None:
    row, config = SAMPLERS[name], {**SD15, "prediction_type": prediction}
    (table,), _ = compiler.tables_for(row.scheduler, config, row.config, [12])
    instance = getattr(diffusers, row.scheduler).from_config(config, **row.config)
    instance.set_timesteps(12, device="cpu")
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * instance.init_noise_sigma
    for call, timestep in zip(table.calls, instance.timesteps, strict=True):
        output = torch.from_numpy(bent_model(instance.scale_model_input(latents, timestep).numpy(), float(timestep)))
        result = instance.step(output, timestep, latents)
        assert call.clean is not None
        clean = call.clean[0] * latents + call.clean[1] * output
        # Loose, as schedulers round timesteps to float32.
        assert relative_error(clean.numpy(), result["pred_original_sample"].numpy()) <= 1e-3
        latents = result.prev_sample


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDPMScheduler", {"thresholding": True}),
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
        ("UniPCMultistepScheduler", {"thresholding": True}),
        ("CMStochasticIterativeScheduler", {}),
    ],
)
def test_a_scheduler_that_bends_the_latents_is_refused_with_the_reason(
    scheduler: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match="clipped, thresholded") as caught:
        compiler.tables_for(scheduler, SD15, settings, [10])
    assert "clip_sample" in caught.value.hint


def test_a_scheduler_with_noise_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(diffusers.EulerDiscreteScheduler):
        def step(self, *args: Any, **options: Any) -> Any:
            result = super().step(*args, **options)
            result.prev_sample = result.prev_sample + torch.randn_like(result.prev_sample)
            return result

    monkeypatch.setattr(diffusers, "NoisyScheduler", Noisy, raising=False)
    with pytest.raises(RecipeError, match="noise of its own"):
        compiler.tables_for("NoisyScheduler", SD15, {}, [5])


def test_a_scheduler_that_adapts_to_the_latents_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Adaptive(diffusers.EulerDiscreteScheduler):
        """Linear in every single run, but with a factor that depends on how large the output is."""

        def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
            factor = 1 / (1 + 1e-3 * model_output.norm() / sample.norm())
            return super().step(model_output * factor, timestep, sample, **options)

    monkeypatch.setattr(diffusers, "AdaptiveScheduler", Adaptive, raising=False)
    with pytest.raises(RecipeError, match="depend on the values"):
        compiler.tables_for("AdaptiveScheduler", SD15, {}, [5])


def test_step_counts_a_scheduler_cannot_do_are_left_out_with_the_reason() -> None:
    compiled, left_out = compiler.tables_for("LCMScheduler", SD15, {"original_inference_steps": 10}, [4, 10, 11])
    assert [t.num_inference_steps for t in compiled] == [4, 10]
    assert "11" in left_out[11]
    with pytest.raises(RecipeError, match="can do none"):
        compiler.tables_for("LCMScheduler", SD15, {"original_inference_steps": 10}, [11])


@pytest.mark.parametrize(
    ("scheduler", "settings", "message", "hint"),
    [
        ("EulerDiscretScheduler", {}, "no scheduler of diffusers", "EulerDiscreteScheduler"),
        ("UNet2DConditionModel", {}, "no scheduler of diffusers", ""),
        ("EulerDiscreteScheduler", {"use_karas_sigmas": True}, "has no setting", "use_karras_sigmas"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "x"}, "refuses its config", ""),
    ],
)
def test_an_unknown_scheduler_or_setting_is_refused(
    scheduler: str, settings: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        compiler.tables_for(scheduler, SD15, settings, [5])
    assert hint in caught.value.hint


def write_source(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


OPEN = {key: value for key, value in SD15.items() if key not in ("steps_offset", "clip_sample")}


@pytest.mark.parametrize("kind", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("stated", [{}, {"steps_offset": 0, "clip_sample": True}, {"clip_sample": False}])
def test_an_outdated_scheduler_config_is_mended_as_the_pipeline_mends_it(
    tmp_path: Path, kind: str, stated: dict[str, Any]
) -> None:
    config = {**OPEN, "_class_name": kind, **stated}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = diffusers.StableDiffusionPipeline(
            vae=None, text_encoder=None, tokenizer=None, unet=None, safety_checker=None, feature_extractor=None,
            scheduler=getattr(diffusers, kind).from_config(config), requires_safety_checker=False,
        )  # fmt: skip
    source = write_source(tmp_path, config)
    switched = diffusers.DDPMScheduler.from_config(pipe.scheduler.config).config
    got = diffusers.DDPMScheduler.from_config(compiler.source_config(source, "DDPMScheduler")).config
    assert (got.steps_offset, got.clip_sample) == (switched.steps_offset, switched.clip_sample)
    own = getattr(diffusers, kind).from_config(compiler.source_config(source, kind)).config
    for key in ("steps_offset", "clip_sample"):
        assert own.get(key) == pipe.scheduler.config.get(key)


def test_a_scheduler_whose_own_default_clips_is_refused_where_the_source_leaves_it_open(tmp_path: Path) -> None:
    config = compiler.source_config(write_source(tmp_path, OPEN))
    with pytest.raises(RecipeError, match="clipped, thresholded"):
        compiler.tables_for("DDIMScheduler", config, {}, [5])
    assert compiler.tables_for("DDIMScheduler", config, {"clip_sample": False}, [5])[0]


def test_a_source_without_a_scheduler_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no scheduler config"):
        compiler.run(
            {"source": tmp_path},
            tmp_path,
            Job("pipeline", {"samplers": [{"name": "ddim", "scheduler": "DDIMScheduler"}], "num_inference_steps": [1]}),
        )


def test_the_step_writes_the_same_bytes_twice_and_says_what_it_left_out(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", SD15)
    samplers = [
        {"name": "mine", "scheduler": "DPMSolverMultistepScheduler", "config": {"use_karras_sigmas": True}},
        {"name": "ipndm", "scheduler": "IPNDMScheduler", "config": {}},
    ]
    for out in (tmp_path / "a", tmp_path / "b"):
        out.mkdir()
        compiler.run({"source": source}, out, Job("samplers", {"samplers": samplers, "num_inference_steps": [1, 2, 3]}))
    for file in ("mine.npz", "ipndm.npz", "samplers.json", "left_out.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    index = json.loads((tmp_path / "a" / "samplers.json").read_text(encoding="utf-8"))
    assert index["mine"] == {
        "scheduler": "DPMSolverMultistepScheduler",
        "config": {"use_karras_sigmas": True},
        "num_inference_steps": [1, 2, 3],
    }
    assert index["ipndm"]["num_inference_steps"] == [2, 3]
    assert "1" in json.loads((tmp_path / "a" / "left_out.json").read_text(encoding="utf-8"))["ipndm"]
    assert load(tmp_path / "a", "mine", 3).calls == load(tmp_path / "b", "mine", 3).calls


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_table_read_back_is_the_table_written(name: str, tmp_path: Path) -> None:
    compiled, _ = tables(name, SD15, (2, 7))
    save(tmp_path, name, compiled)
    assert [load(tmp_path, name, n) for n in (2, 7)] == compiled


@pytest.mark.parametrize(("name", "limit_bytes"), [("ddim", 150_000), ("unipc", 600_000)])
def test_fifty_step_counts_take_little_room(name: str, limit_bytes: int, tmp_path: Path) -> None:
    """ddim's rows are the shortest, unipc's the longest of the samplers bundles usually hold."""
    path = save(tmp_path, name, tables(name, SD15, tuple(range(1, 51)))[0])
    assert path.stat().st_size < limit_bytes


AYS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_timesteps_of_a_recipe_are_those_of_the_scheduler(scheduler: str) -> None:
    (table,), _ = compiler.tables_for(scheduler, SD15, {"timesteps": AYS}, [20, 30])
    assert table.num_inference_steps == 10
    assert [call.timestep for call in table.calls] == AYS
    instance = getattr(diffusers, scheduler).from_config(SD15)
    instance.set_timesteps(timesteps=AYS, device="cpu")
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) * instance.init_noise_sigma
    for timestep in instance.timesteps:
        output = torch.from_numpy(bent_model(instance.scale_model_input(latents, timestep).numpy(), float(timestep)))
        latents = instance.step(output, timestep, latents).prev_sample
    assert relative_error(by_table(table), latents.numpy()) <= PARITY
    with pytest.raises(RecipeError, match="DDIMScheduler does not take timesteps"):
        compiler.table("DDIMScheduler", SD15, 10, {"timesteps": AYS})


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in ("pndm", "unipc", "sasolver", "ipndm")])
def test_a_table_begins_at_a_later_step_as_its_scheduler_does(name: str) -> None:
    from sdcompile.runtime.joining import begun_at

    (table,) = tables(name, SD15, (12,))[0]
    instance = getattr(diffusers, SAMPLERS[name].scheduler).from_config({**SD15, **SAMPLERS[name].config})
    for step in (1, 5, 11):
        theirs = copy.deepcopy(instance)
        theirs.set_timesteps(12, device="cpu")
        first = step * getattr(theirs, "order", 1)
        if hasattr(theirs, "set_begin_index"):
            theirs.set_begin_index(first)
        generator = torch.Generator("cpu").manual_seed(3)
        noise, clean = torch.randn(SHAPE, generator=generator), torch.full(SHAPE, 0.5)
        latents = theirs.add_noise(clean, noise, theirs.timesteps[first : first + 1])
        taken = inspect.signature(theirs.step).parameters
        options = {"generator": generator, "eta": 0.0}
        options = {key: value for key, value in options.items() if key in taken}
        for timestep in theirs.timesteps[first:]:
            output = torch.from_numpy(bent_model(theirs.scale_model_input(latents, timestep).numpy(), float(timestep)))
            latents = theirs.step(output, timestep, latents, **options).prev_sample
        late, ours = begun_at(table, step), Generator(3)
        found = sample(
            late, lambda x, index, images, late=late: bent_model(x, late.calls[index].timestep), ours.randn(SHAPE),
            lambda ours=ours: ours.randn(SHAPE), clean=clean.numpy(),
        )  # fmt: skip
        assert relative_error(found, latents.numpy()) <= 1e-4, step


def test_samplers_that_look_back_to_their_beginning_have_no_starts() -> None:
    for name in ("unipc", "sasolver", "pndm"):
        assert not tables(name, SD15, (20,))[0][0].starts
