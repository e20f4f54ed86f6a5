"""The pipeline: prompts to images with a model's engines, in diffusers' calling convention.

Semantics are those of diffusers' StableDiffusionPipeline: the same arguments and seed give the
same picture. It knows no file format, no backend and no scheduler; what is special to a kind of
model is in its family.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sdcompile.backends import Engine
from sdcompile.errors import RecipeError, StageError
from sdcompile.families import FAMILIES
from sdcompile.runtime import guidance, joining, tables
from sdcompile.runtime import images as pictures
from sdcompile.runtime import sampler as samplers
from sdcompile.runtime.arrays import NUMPY
from sdcompile.runtime.batches import in_parts
from sdcompile.runtime.denoising import Denoiser
from sdcompile.runtime.diskcache import DiskCache
from sdcompile.runtime.embedding import Embedder
from sdcompile.runtime.imagecache import ImageCache
from sdcompile.runtime.masking import Kept
from sdcompile.runtime.memory import remembered
from sdcompile.runtime.model import Model
from sdcompile.runtime.noise import noise_source
from sdcompile.runtime.ondevice import DeviceDenoiser, device_for
from sdcompile.runtime.options import Options
from sdcompile.runtime.output import Clock, Output
from sdcompile.runtime.profiles import PowerState
from sdcompile.runtime.promptcache import PromptCache
from sdcompile.runtime.request import ENCODER, Request, resolve, second_pass
from sdcompile.runtime.stepcache import DeepFeatures
from sdcompile.runtime.tiles import Tiling, over_tiles
from sdcompile.runtime.values import Stage
from sdcompile.spec import FULL, Range, at_target, at_width

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    Floats = NDArray[np.float32]

CallbackOnStepEnd = Callable[["Pipeline", int, float, dict[str, Any]], "Mapping[str, Any] | None"]
"""(pipeline, step, timestep, {"latents": array}) -> None, or {"latents": what to go on with}, as in diffusers."""

Watch = Callable[[int], None]
"""Told of every finished step."""

_TEXT_ENCODER, _VAE_DECODER = "text_encoder", "vae_decoder"
_REMEMBERED_TABLES = 8


class Pipeline:
    """Makes images. Engines are opened by `open_engine(component)` when first needed.

    With `low_memory` at most one engine is open at a time, or the two that take turns in step caching. Use as a
    context manager, or call `close`, to free engines. Where `power_state` is set, the bundle's policy chooses the
    profile of every request that names none. One request at a time: it is not safe to call from several threads.
    """

    def __init__(self, model: Model, open_engine: Callable[[str], Engine], *, low_memory: bool = False) -> None:
        self.model = model
        self.family = FAMILIES[model.family]
        self.low_memory = low_memory
        self.power_state: PowerState | None = None
        self.warm = False
        self.embedder = Embedder(model, self._run_text_encoder)
        self.finished: ImageCache | None = None
        self._open_engine = open_engine
        self._engines: dict[str, Engine] = {}
        self._tables: OrderedDict[tuple[str, int], tables.Table] = OrderedDict()
        self._clock = Clock()

    def __call__(
        self,
        prompt: str | Sequence[str] | None,
        *,
        callback_on_step_end: CallbackOnStepEnd | None = None,
        watch: Watch | None = None,
        **options: Any,
    ) -> Output:
        """Make images of one prompt or several; `options` are those of `runtime.options.Options`.

        What is left open takes the model's defaults. Batches beyond what the engines take at once
        are split; the noise stays that of one batch. `watch` only looks on, where a callback may change
        latents: of a call with a callback no finished images are kept or taken.

        Raises RecipeError (a bad value), BundleError (not built for this), StageError (NaN or
        infinite values, with the step at which they came up).
        """
        asked = Options.of(options)
        if asked.profile is None and self.power_state is not None:
            asked = replace(asked, profile=self.model.profiles.chosen(self.power_state()))
        return self.make(resolve(self.model, prompt, asked), callback_on_step_end, watch)

    def make(self, request: Request, callback: CallbackOnStepEnd | None = None, watch: Watch | None = None) -> Output:
        """Make the images of a resolved request, or take them from where finished ones are kept."""
        self._clock = Clock()
        kept = self.finished if request.seeded and callback is None else None
        images = None if kept is None else kept.get(request)
        if images is not None:
            self._clock.images_read = len(images)
        else:
            images = self._made(request, callback, watch)
            if kept is not None:
                kept.put(request, images)
        return Output(images, request, self._clock.timings(), self.model.name, self.model.digest, self.target)

    def _made(
        self, request: Request, callback: CallbackOnStepEnd | None = None, watch: Watch | None = None
    ) -> list[Image] | Floats:
        final = self._denoise(request, callback, watch)
        if request.hires is not None:
            final = self._denoise(second_pass(request, self.model, final), callback, watch)
        if request.output_type == "latent":
            return final
        pixels = pictures.pixels_from_decoded(self.decode(final))
        return pictures.pil_from_pixels(pixels) if request.output_type == "pil" else pixels

    @property
    def target(self) -> str:
        """Which of the bundle's targets makes the images; "" where the bundle has one. `why` tells the reason."""
        return self.model.target

    @property
    def why(self) -> str:
        """Why `target` was chosen, and what kept each preferred one from running here; "" where there is one."""
        return self.model.why

    def keep_prompts(self, folder: Path, limit_bytes: int) -> None:
        """Keep prompt embeddings below `folder`, for every process that runs the same text encoder."""
        self.embedder.disk = PromptCache(DiskCache.at(folder, limit_bytes), self.model.encoder_digest)

    def keep_images(self, folder: Path, limit_bytes: int) -> None:
        """Keep finished images below `folder`, for every process that runs the same bundle.

        A request that comes again with the same seed, options and output_type gets the same bytes at once.
        Of a model without a digest, one that is still being built, nothing is kept.
        """
        of = at_target(self.model.digest, self.model.target)
        self.finished = ImageCache(DiskCache.at(folder, limit_bytes), of) if self.model.digest else None

    def warm_up(self) -> float:
        """Open every engine and run it once at the default size, so that the first request finds them ready.

        Of several widths only the default one is. Returns the seconds it took. Of no use with `low_memory`, which
        closes engines after use.
        """
        began = time.perf_counter()
        steps = self.model.samplers[self.model.defaults.sampler].num_inference_steps
        shallow = self.family.shallow in self.model.components
        # The shallow engine first runs in the second step.
        fewest = min((n for n in steps if n > shallow), default=max(steps))
        asked = Options(num_inference_steps=fewest, step_cache=2 if shallow else "off", seed=0, output_type="np")
        # Not by a call, which finished images that are kept may answer without an engine.
        self._made(resolve(self.model, "", asked))
        self.warm = True
        return time.perf_counter() - began

    def table(self, sampler: str, num_inference_steps: int) -> tables.Table:
        """The compiled table of one of the model's samplers."""
        return remembered(
            self._tables, (sampler, num_inference_steps), _REMEMBERED_TABLES,
            lambda: tables.load(self.model.tables, sampler, num_inference_steps),
        )  # fmt: skip

    def engine(self, component: str) -> Engine:
        """The open engine of `component`; with `low_memory`, every other one is closed first."""
        if component not in self._engines:
            if self.low_memory:
                self._close_but({self.family.denoiser, self.family.shallow} if component == self.family.shallow else ())
            began = time.perf_counter()
            self._engines[component] = self._open_engine(component)
            self._clock.open_s += time.perf_counter() - began
        return self._engines[component]

    def close(self) -> None:
        """Close every open engine; the next call opens what it needs again."""
        self._close_but(())

    def _close_but(self, kept: Collection[str]) -> None:
        for component in [name for name in self._engines if name not in kept]:
            self._engines.pop(component).close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_text_encoder(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        engine = self.engine(_TEXT_ENCODER)
        began = time.perf_counter()
        arrays = in_parts(engine, feeds, _encoder_rows(self.model))
        self._clock.text_encoder_s += time.perf_counter() - began
        return arrays

    def _embed(self, texts: Sequence[str], weighting: str) -> dict[str, Floats]:
        before = replace(self.embedder.counts)
        arrays = self.embedder(texts, weighting)
        counts = self.embedder.counts
        self._clock.prompts_cached += counts.remembered - before.remembered
        self._clock.prompts_read += counts.read - before.read
        self._clock.prompts_computed += counts.computed - before.computed
        return arrays

    def road(self, request: Request) -> tuple[tables.Table, tuple[float, ...]]:
        """The table that makes `request`, and the guidance scale of each of its calls."""
        steps = request.num_inference_steps
        stages = request.stages or (Stage(request.sampler),)
        if request.first_step is not None:
            table = joining.begun_at(self.table(request.sampler, steps), request.first_step)
            timesteps = tuple(call.timestep for call in table.calls)
            return table, guidance.scales(
                request.guidance_scale, request.guidance_schedule, request.guidance_interval, timesteps
            )
        parts = [self.table(stage.sampler, steps) for stage in stages]
        table, firsts = joining.joined(parts, [stage.steps or 0 for stage in stages[:-1]])
        timesteps = tuple(call.timestep for call in table.calls)
        scales: tuple[float, ...] = ()
        for stage, first, last in zip(stages, firsts, (*firsts[1:], len(timesteps)), strict=True):
            scale = request.guidance_scale if stage.guidance_scale is None else stage.guidance_scale
            whole = guidance.scales(scale, request.guidance_schedule, request.guidance_interval, timesteps)
            scales += whole[first:last]
        return table, scales

    def denoiser(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        scales: tuple[float, ...],
        timesteps: tuple[float, ...] = (),
        rescale: float = 0.0,
        weighting: str = "off",
        step_cache: int | None = None,
        unet_width: str = FULL,
    ) -> Denoiser:
        """The denoiser for these prompts, one image each; `scales` and `timesteps` are those of its calls."""
        guided = max(scales) > 1 and not self.model.facts.get("time_cond_proj_dim")
        embedded = self._embed((*negative_prompts, *prompts) if guided else prompts, weighting)
        images = len(prompts)
        return Denoiser(
            engine=self.engine(at_width(self.family.denoiser, unet_width)),
            family=self.family,
            facts=self.model.facts,
            rows=self.model.shapes["R"],
            timesteps=timesteps,
            scales=scales,
            rescale=rescale,
            positive={name: array[-images:] for name, array in embedded.items()},
            negative={name: array[:images] for name, array in embedded.items()} if guided else None,
            clock=self._clock,
            shallow=None if step_cache is None else self.engine(self.family.shallow),
            features=None if step_cache is None else DeepFeatures(step_cache),
        )  # fmt: skip

    def _denoise(self, request: Request, callback: CallbackOnStepEnd | None, watch: Watch | None) -> Floats:
        table, scales = self.road(request)
        shape = request.latent_shape(self.model)
        draw = noise_source(request.seeds, shape)
        clean = request.clean if request.image is None else self._encode(request, draw)
        noise = draw(shape[0]) if request.latents is None else request.latents
        if clean is not None and request.mask is not None:
            # As in diffusers, which encodes the masked picture as well and draws for it.
            draw(len(clean) if len(request.seeds) == 1 else shape[0])
        keep = None if clean is None or request.mask is None else Kept(table, clean, noise, request.mask)
        denoiser = self.denoiser(
            request.prompts, request.negative_prompts, scales, tuple(call.timestep for call in table.calls),
            request.guidance_rescale, request.prompt_weighting, request.step_cache, request.unet_width,
        )  # fmt: skip
        before = self._clock.steps or [0] * len(noise)
        self._clock.steps = [calls + len(table.calls) for calls in before]
        tiling = self._tiling(shape[2], shape[3])
        looks = callback is not None or tiling is not None or keep is not None
        device = device_for(denoiser, table, request, shape[0], looks=looks)
        self._clock.on_device.append(device is not None)
        there = None if device is None else DeviceDenoiser.of(denoiser, device)

        def denoise(model_input: Floats, index: int, images: NDArray[np.intp]) -> Floats:
            if tiling is None:
                return denoiser(model_input, index, images)
            of_tiles = np.tile(images, tiling.count)
            places = of_tiles + len(noise) * np.repeat(np.arange(tiling.count), len(images))
            return over_tiles(lambda tiles: denoiser(tiles, index, of_tiles, places), model_input, tiling)

        def on_step(index: int, timestep: float, latents: Floats) -> Floats | None:
            latents = latents if keep is None else keep.put_back(index, latents)
            if callback is None:
                if watch is not None:
                    (device or NUMPY).wait()
                    watch(index)
                return latents
            told = int(timestep) if float(timestep).is_integer() else timestep
            answer = callback(self, index, told, {"latents": latents})
            replaced = _replacement(answer, latents, shape)
            return latents if replaced is None else replaced

        def on_stopped(images: NDArray[np.intp], calls: int) -> None:
            for image in images.tolist():
                self._clock.steps[image] = before[image] + calls

        final = samplers.sample(
            table, there or denoise, noise, lambda: draw(shape[0]), on_step,
            clean=clean, early_stop=request.early_stop, on_stopped=on_stopped, arrays=device or NUMPY,
        )  # fmt: skip
        if there is not None:
            there.finish()
        return final if keep is None or request.early_stop is None else keep.put_back(len(table.calls) - 1, final)

    def _encode(self, request: Request, draw: Callable[[int], Floats]) -> Floats:
        """The latents (1 or N, C, h, w) of the request's picture, drawn from what its encoder says of them.

        With one seed for the batch a single picture is drawn once, with a seed per image once for
        each, as in diffusers' img2img, so that every image can be made again alone.
        """
        assert request.image is not None
        facts, engine = self.model.facts, self.engine(ENCODER)
        began = time.perf_counter()
        factor = facts["vae_scale_factor"]
        moments = self._over_tiles(engine, "sample", request.image, down=factor)
        self._clock.vae_s += time.perf_counter() - began
        if len(request.seeds) > 1:
            moments = np.broadcast_to(moments, (len(request.seeds), *moments.shape[1:]))
        mean, variance_log = np.split(moments, 2, axis=1)
        latents = mean + np.exp(np.float32(0.5) * variance_log.clip(-30, 20)) * draw(len(mean))
        if not np.isfinite(latents).all():
            raise StageError(
                "the picture's latents hold values that are NaN or infinite",
                f"build {ENCODER} in a wider precision (bf16 or fp32)",
            )
        scaled = (latents - np.float32(facts["shift_factor"])) * np.float32(facts["scaling_factor"])
        return scaled.astype(np.float32, copy=False)

    def decode(self, latents: Floats) -> Floats:
        """Final latents (N, C, h, w) -> decoded pixels (N, 3, H, W) in about [-1, 1]."""
        facts, engine = self.model.facts, self.engine(_VAE_DECODER)
        began = time.perf_counter()
        scale = facts.get("decoder", facts)  # one of another source has its own
        unscaled = latents / np.float32(scale["scaling_factor"]) + np.float32(scale["shift_factor"])
        decoded = self._over_tiles(engine, "latent_sample", unscaled, up=facts["vae_scale_factor"])
        self._clock.vae_s += time.perf_counter() - began
        if not np.isfinite(decoded).all():
            raise StageError(
                "the decoded picture holds values that are NaN or infinite",
                "build vae_decoder in a wider precision (bf16 or fp32)",
            )
        return decoded

    def _tiling(self, height: int, width: int, letters: str = "hw") -> Tiling | None:
        """How to cover an area that the engines do not take at once; None where they do."""
        tile = [min(side, self.model.shapes[letter].max) for side, letter in zip((height, width), letters, strict=True)]
        return None if tile == [height, width] else Tiling(height, width, *tile)

    def _over_tiles(self, engine: Engine, name: str, array: Floats, up: int = 1, down: int = 1) -> Floats:
        """A half of the VAE, in tiles where `array` is larger than the engine takes."""

        def run(part: Floats) -> Floats:
            (made,) = in_parts(engine, {name: part}, self.model.shapes["B"]).values()
            return made

        tiling = self._tiling(array.shape[2], array.shape[3], "HW" if down > 1 else "hw")
        return run(array) if tiling is None else over_tiles(run, array, tiling, up, down)


def _encoder_rows(model: Model) -> Range:
    """Rows of every call of the text encoder: those of a first usual request, prompt and negative prompt.

    A later prompt, whose negative one is remembered, would otherwise be a call of one row, for which an engine
    of static shapes is compiled once more. It also keeps a prompt's embedding the same whatever it comes with.
    """
    built = model.shapes["R"]
    usual = 2 if model.defaults.guidance_scale > 1 and not model.facts.get("time_cond_proj_dim") else 1
    rows = min(max(usual, built.min), built.max)
    return Range(rows, rows, rows)


def _replacement(answer: Mapping[str, Any] | None, latents: Floats, shape: tuple[int, ...]) -> Floats | None:
    """The latents a callback gives back, checked; None when it leaves them be."""
    replaced = None if answer is None else answer.get("latents")
    if replaced is None or replaced is latents:
        return None
    replaced = np.asarray(replaced)
    if replaced.shape != shape or replaced.dtype.kind != "f":
        raise RecipeError(
            f"callback_on_step_end gave back latents {replaced.shape} {replaced.dtype}; they must be {shape} float32"
        )
    return np.ascontiguousarray(replaced, np.float32)
