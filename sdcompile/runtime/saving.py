"""Pictures to files: what `sdcompile generate` does with a pipeline.

Every image gets a seed of its own, so that any file can be made again alone; each group of images
is written as soon as it is done.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.errors import HostError, RecipeError
from sdcompile.runtime import values
from sdcompile.runtime.images import save_png
from sdcompile.runtime.options import Options
from sdcompile.runtime.promptfiles import Row

if TYPE_CHECKING:
    from sdcompile.runtime.pipeline import Pipeline

Progress = Callable[[int, int, int], None]
"""(images finished, denoising step in hand, denoising steps of an image)."""

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Wanted:
    """One image to be made: `options` hold what may differ from image to image besides."""

    prompt: str
    negative_prompt: str | None
    seed: int
    options: Options


@dataclass(frozen=True)
class Saved:
    """One written image."""

    path: Path
    prompt: str
    seed: int
    seconds: float


def images_of(rows: Iterable[Row], common: Options) -> list[Wanted]:
    """Every image of `rows`, whose options win over `common`. `common.seed` is the first image's seed
    (None draws one) and counts up; a row with a seed of its own counts up from that.

    Raises RecipeError for a seed out of range.
    """
    first = new_seed() if common.seed is None else values.whole("--seed", common.seed)
    wanted: list[Wanted] = []
    for row in rows:
        own = row.options.over(common)
        count = values.count("num_images_per_prompt", own.num_images_per_prompt or 1)
        begin = first + len(wanted) if row.options.seed is None else row.options.seed
        if not 0 <= begin <= MAX_SEED - count:
            raise RecipeError(f"--seed {begin} is out of range", f"a whole number from 0 to {MAX_SEED - count}")
        shared = replace(own, seed=None, negative_prompt=None, num_images_per_prompt=None)
        wanted += [Wanted(row.prompt, own.negative_prompt, begin + number, shared) for number in range(count)]
    return wanted


def generate_files(
    pipeline: Pipeline, rows: Sequence[Row], output: Path, *, common: Options, latents: Path | None, progress: Progress
) -> list[Saved]:
    """Make the images of `rows` and write them below `output` as PNG.

    Raises RecipeError for a seed out of range or unreadable latents, HostError when `output`
    cannot be written, and what the pipeline raises.
    """
    wanted = images_of(rows, common)
    noise = None if latents is None else _read_latents(latents)
    make_folder(output)
    saved: list[Saved] = []
    size = max(1, pipeline.model.shapes["B"].max)
    groups = list(grouped(wanted, size))
    if len(groups) == 1 and not pipeline.warm:
        # Every engine is used once, so closing it after use costs no time, and the peaks do not add up.
        pipeline.low_memory = True
    for group in groups:
        part = None if noise is None else noise[len(saved) : len(saved) + len(group)]
        saved += make_group(pipeline, group, output, latents=part, watch=partial(_tell, progress, len(saved)))
        progress(len(saved), 0, 0)
    return saved


def grouped(wanted: Sequence[Wanted], size: int) -> Iterator[list[Wanted]]:
    """Neighbours that one call of the pipeline can make: the same options, at most `size`."""
    for _, same in itertools.groupby(wanted, key=lambda image: image.options):
        run = list(same)
        for begin in range(0, len(run), size):
            yield run[begin : begin + size]


def make_group(
    pipeline: Pipeline,
    group: Sequence[Wanted],
    output: Path,
    *,
    latents: Any = None,
    watch: Callable[[int], None] | None = None,
    number: int | None = None,
) -> list[Saved]:
    """Make one group of images and write them. With `number`, that of its first image, files are named by
    their numbers and written anew; else no file is overwritten. Raises HostError when `output` cannot be written.
    """
    default = pipeline.model.defaults.negative_prompt
    options = group[0].options.given()
    if latents is not None:
        options["latents"] = latents
    made = pipeline(
        [image.prompt for image in group],
        negative_prompt=[default if image.negative_prompt is None else image.negative_prompt for image in group],
        seed=[image.seed for image in group],
        watch=watch,
        **options,
    )
    timings = made.timings
    seconds = (sum(timings["denoise_s"]) + timings["vae_s"] + timings["text_encoder_s"]) / len(made.images)
    saved = []
    for index, (wanted, image) in enumerate(zip(group, made.images, strict=True)):
        name = _name(wanted.prompt, wanted.seed)
        path = _free(output, name) if number is None else output / f"{number + index:06d}_{name}.png"
        try:
            partial_file = path.with_suffix(".part")
            save_png(image, partial_file, made.metadata(index))
            partial_file.replace(path)
        except OSError as error:
            raise HostError(f"cannot write {path}: {error.strerror}", "choose another folder with --output") from error
        saved.append(Saved(path, wanted.prompt, wanted.seed, seconds))
    return saved


def _tell(progress: Progress, done: int, step: int) -> None:
    progress(done, step + 1, 0)


def new_seed() -> int:
    """A seed of 32 bits, from the system's randomness."""
    import secrets

    return secrets.randbelow(2**32)


def _read_latents(path: Path) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RecipeError(f"--latents {path}: not a readable .npy file: {error}", "save it with numpy.save") from error


def make_folder(output: Path) -> None:
    """Make `output`, and see that it can be written. Raises HostError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise HostError(
            f"cannot write images to {output}: {error.strerror}", "choose another folder with --output"
        ) from error


def _name(prompt: str, seed: int) -> str:
    """A file name, without its ending, that tells prompt and seed."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "image"
    return f"{words}_seed{seed}"


def _free(output: Path, name: str) -> Path:
    path, number = output / f"{name}.png", 2
    while path.exists():
        path, number = output / f"{name}_{number}.png", number + 1
    return path
