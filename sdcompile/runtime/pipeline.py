"""The pipeline: prompts to images with a model's engines, in diffusers' calling convention.

Semantics are those of diffusers' StableDiffusionPipeline: the same arguments and seed give the
same picture. It knows no file format, no backend and no scheduler; what is special to a kind of
model is in its family.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from sdcompile.backends import Engine
from sdcompile.errors import RecipeError, StageError
from sdcompile.families import FAMILIES
from sdcompile.runtime import images as pictures
from sdcompile.runtime import sampler as samplers
from sdcompile.runtime.model import Model
from sdcompile.runtime.noise import Generator
from sdcompile.runtime.request import Request, resolve
from sdcompile.runtime.tokens import Tokenizer
from sdcompile.spec import Range

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    Floats = NDArray[np.float32]

CallbackOnStepEnd = Callable[["Pipeline", int, float, dict[str, Any]], "Mapping[str, Any] | None"]
"""(pipeline, step, timestep, {"latents": array}) -> None, or {"latents": what to go on with}, as in diffusers."""

K = TypeVar("K")
V = TypeVar("V")

_TEXT_ENCODER, _VAE_DECODER = "text_encoder", "vae_decoder"
_REMEMBERED_PROMPTS = 64
_REMEMBERED_TABLES = 8


@dataclass(frozen=True)
class Output:
    """What a call made.

    images    PIL images, (N, H, W, 3) float32 in [0, 1], or latents (N, C, h, w): as `output_type` asked
    request   every argument as resolved: prompts per image, seeds, sampler, steps, size
    timings   seconds: text_encoder_s, denoise_s (one per denoiser step), vae_s, open_s (engines, in all)
    """

    images: list[Image] | Floats
    request: Request
    timings: Mapping[str, Any]
    model: str = ""
    digest: str = ""

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.request.seeds

    @property
    def sampler(self) -> str:
        return self.request.sampler

    @property
    def num_inference_steps(self) -> int:
        return self.request.num_inference_steps

    def metadata(self, index: int) -> dict[str, str]:
        """How image `index` was made, as PNG text. `seed` and `index` name it: one seed may serve a whole batch."""
        request = self.request
        return {
            "prompt": request.prompts[index],
            "negative_prompt": request.negative_prompts[index],
            "seed": str(request.seeds[index] if len(request.seeds) > 1 else request.seeds[0]),
            "index": str(index),
            "batch": str(len(request.prompts)),
            "sampler": request.sampler,
            "num_inference_steps": str(request.num_inference_steps),
            "guidance_scale": f"{request.guidance_scale:g}",
            "size": f"{request.width}x{request.height}",
            "model": self.model,
            "bundle": self.digest,
        }


@dataclass
class _Clock:
    text_encoder_s: float = 0.0
    denoise_s: list[float] = field(default_factory=list)
    vae_s: float = 0.0
    open_s: float = 0.0

    def timings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class Pipeline:
    """Makes images. Engines are opened by `open_engine(component)` when first needed.

    With `low_memory` at most one engine is open at a time. Use as a context manager, or call
    `close`, to free engines. One request at a time: it is not safe to call from several threads.
    """

    def __init__(self, model: Model, open_engine: Callable[[str], Engine], *, low_memory: bool = False) -> None:
        self.model = model
        self.family = FAMILIES[model.family]
        self.low_memory = low_memory
        self._open_engine = open_engine
        self._engines: dict[str, Engine] = {}
        self._tokenizer: Tokenizer | None = None
        self._embedded: OrderedDict[str, dict[str, Floats]] = OrderedDict()
        self._tables: OrderedDict[tuple[str, int], samplers.Table] = OrderedDict()
        self._clock = _Clock()

    def __call__(
        self,
        prompt: str | Sequence[str] | None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        latents: Any = None,
        sampler: str | None = None,
        output_type: str = "pil",
        callback_on_step_end: CallbackOnStepEnd | None = None,
    ) -> Output:
        """Make images; what is left open takes the model's defaults.

        seed       one int for the whole batch (as diffusers with one generator), or one per image
                   (as a list of generators); None draws one, told in the output
        latents    unit noise (N, C, h, w) to start from, instead of the seed's; as in diffusers it
                   is scaled for the sampler here
        height, width  pixels

        Batches beyond what the engines take at once are split; the noise stays that of one batch.

        Raises RecipeError (a bad value), BundleError (not built for this), StageError (NaN or
        infinite values, with the step at which they came up).
        """
        request = resolve(
            self.model, prompt, negative_prompt, num_inference_steps, guidance_scale, height, width,
            num_images_per_prompt, seed, latents, sampler, output_type,
        )  # fmt: skip
        self._clock = _Clock()
        table = self.table(request.sampler, request.num_inference_steps)
        conditioning = self._conditioning(request)
        final = self._denoise(request, table, conditioning, callback_on_step_end)
        images: list[Image] | Floats = final
        if request.output_type != "latent":
            images = pictures.pixels_from_decoded(self._decode(final))
            if request.output_type == "pil":
                images = pictures.pil_from_pixels(images)
        return Output(images, request, self._clock.timings(), self.model.name, self.model.digest)

    def table(self, sampler: str, num_inference_steps: int) -> samplers.Table:
        """The compiled table of one of the model's samplers."""
        return _remembered(
            self._tables, (sampler, num_inference_steps), _REMEMBERED_TABLES,
            lambda: samplers.load(self.model.tables, sampler, num_inference_steps),
        )  # fmt: skip

    def engine(self, component: str) -> Engine:
        """The open engine of `component`; with `low_memory`, every other one is closed first."""
        if component not in self._engines:
            if self.low_memory:
                self.close()
            began = time.perf_counter()
            self._engines[component] = self._open_engine(component)
            self._clock.open_s += time.perf_counter() - began
        return self._engines[component]

    def close(self) -> None:
        """Close every open engine; the next call opens what it needs again."""
        while self._engines:
            self._engines.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def embed(self, prompts: Sequence[str]) -> dict[str, Floats]:
        """Conditioning arrays with one row per prompt; prompts met before are not computed again."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._embedded]
        rows = {p: self._embedded[p] for p in prompts if p in self._embedded}
        if new:
            if self._tokenizer is None:
                self._tokenizer = Tokenizer(self.model.tokenizer_file, self.model.tokenizer)
            ids = self._tokenizer.ids(new)
            engine = self.engine(_TEXT_ENCODER)
            began = time.perf_counter()
            arrays = self.family.embed(lambda feeds: in_parts(engine, feeds, self.model.shapes["R"]), ids)
            self._clock.text_encoder_s += time.perf_counter() - began
            for name, array in arrays.items():
                if not np.isfinite(array).all():
                    raise StageError(
                        f"the text encoder's {name} holds values that are NaN or infinite",
                        "build the text encoder in a wider precision (bf16 or fp32)",
                    )
            rows |= {p: {name: array[i] for name, array in arrays.items()} for i, p in enumerate(new)}
        for prompt, row in rows.items():
            _remembered(self._embedded, prompt, _REMEMBERED_PROMPTS, partial(dict, row))
        return {name: np.stack([rows[p][name] for p in prompts]) for name in rows[prompts[0]]}

    def _conditioning(self, request: Request) -> dict[str, Floats]:
        """One row per denoiser row: as in diffusers, all negative prompts and then all prompts."""
        texts = (*request.negative_prompts, *request.prompts) if request.guided else request.prompts
        embedded = self.embed(texts)
        return {**embedded, **self.family.guidance_feeds(self.model.facts, request.guidance_scale, len(texts))}

    def _denoise(
        self,
        request: Request,
        table: samplers.Table,
        conditioning: Mapping[str, Floats],
        callback: CallbackOnStepEnd | None,
    ) -> Floats:
        shape = request.latent_shape(self.model)
        draw = _noise_source(request.seeds, shape)
        noise = draw() if request.latents is None else request.latents
        engine = self.engine(self.family.denoiser)
        rows, scale = self.model.shapes["R"], np.float32(request.guidance_scale)

        def denoise(model_input: Floats, timestep: float) -> Floats:
            began = time.perf_counter()
            sample = np.concatenate([model_input, model_input]) if request.guided else model_input
            feeds = {"sample": sample, "timestep": np.full(len(sample), timestep, np.float32), **conditioning}
            (output,) = in_parts(engine, feeds, rows).values()
            if request.guided:
                negative, positive = np.split(output, 2)
                output = negative + scale * (positive - negative)
            self._clock.denoise_s.append(time.perf_counter() - began)
            return output

        def on_step(index: int, timestep: float, latents: Floats) -> Floats | None:
            if callback is None:
                return None
            told = int(timestep) if float(timestep).is_integer() else timestep
            answer = callback(self, index, told, {"latents": latents})
            return _replacement(answer, latents, shape)

        return samplers.sample(table, denoise, noise, draw, on_step)

    def _decode(self, latents: Floats) -> Floats:
        """Final latents (N, C, h, w) -> decoded pixels (N, 3, H, W) in about [-1, 1]."""
        facts, engine = self.model.facts, self.engine(_VAE_DECODER)
        began = time.perf_counter()
        unscaled = latents / np.float32(facts["scaling_factor"]) + np.float32(facts["shift_factor"])
        (decoded,) = in_parts(engine, {"latent_sample": unscaled}, self.model.shapes["B"]).values()
        self._clock.vae_s += time.perf_counter() - began
        if not np.isfinite(decoded).all():
            raise StageError(
                "the decoded picture holds values that are NaN or infinite",
                "build vae_decoder in a wider precision (bf16 or fp32)",
            )
        return decoded


def in_parts(engine: Engine, feeds: Mapping[str, np.ndarray], rows: Range) -> dict[str, np.ndarray]:
    """Run `engine` on feeds of any number of rows: as many per call as `rows` allows, evenly, and
    padded with copies of the last row where `rows` asks for more."""
    total = len(next(iter(feeds.values())))
    calls = -(-total // rows.max)
    bounds = [total * part // calls for part in range(calls + 1)]
    parts = []
    for first, last in itertools.pairwise(bounds):
        part = {name: _padded(array[first:last], rows.min) for name, array in feeds.items()}
        parts.append({name: array[: last - first] for name, array in engine(part).items()})
    return parts[0] if calls == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    missing = rows - len(array)
    if missing <= 0:
        return np.ascontiguousarray(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])


def _noise_source(seeds: Sequence[int], shape: tuple[int, ...]) -> Callable[[], Floats]:
    """Successive unit noise: the whole batch from one generator, or each image from its own."""
    generators = [Generator(seed) for seed in seeds]
    if len(generators) == 1:
        return lambda: generators[0].randn(shape)
    return lambda: np.concatenate([generator.randn((1, *shape[1:])) for generator in generators])


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


def _remembered(memory: OrderedDict[K, V], key: K, most: int, make: Callable[[], V]) -> V:
    """`memory[key]`, made when missing; the entries used longest ago make room."""
    if key not in memory:
        memory[key] = make()
    memory.move_to_end(key)
    while len(memory) > most:
        memory.popitem(last=False)
    return memory[key]
