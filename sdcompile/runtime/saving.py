"""Pictures to files: what `sdcompile generate` does with a pipeline.

Every image gets a seed of its own (the first one plus its number), so that any file can be made
again alone; each group of images is written as soon as it is done.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.errors import HostError, RecipeError
from sdcompile.runtime.images import save_png

if TYPE_CHECKING:
    from sdcompile.runtime.pipeline import Pipeline

Progress = Callable[[int, int, int], None]
"""(images finished, denoising step in hand, denoising steps of an image)."""

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Saved:
    """One written image."""

    path: Path
    prompt: str
    seed: int
    seconds: float


def generate_files(
    pipeline: Pipeline,
    prompts: Sequence[str],
    output: Path,
    *,
    seed: int | None,
    num_images_per_prompt: int,
    latents: Path | None,
    progress: Progress,
    **arguments: Any,
) -> list[Saved]:
    """Make `num_images_per_prompt` images of every prompt and write them below `output` as PNG.

    Raises RecipeError for a seed out of range or unreadable latents, HostError when `output`
    cannot be written, and what the pipeline raises.
    """  # fmt: skip
    wanted = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
    first = _new_seed() if seed is None else seed
    if not 0 <= first <= MAX_SEED - len(wanted):
        raise RecipeError(f"--seed {first} is out of range", f"a whole number from 0 to {MAX_SEED - len(wanted)}")
    seeds = [first + index for index in range(len(wanted))]
    noise = None if latents is None else _read_latents(latents)
    _make_folder(output)
    saved: list[Saved] = []
    size = max(1, pipeline.model.shapes["B"].max)
    if len(wanted) <= size:
        # Every engine is used once, so closing it after use costs no time, and the peaks do not add up.
        pipeline.low_memory = True
    for begin in range(0, len(wanted), size):
        group = slice(begin, begin + size)
        made = pipeline(
            wanted[group],
            seed=seeds[group],
            latents=None if noise is None else noise[group],
            callback_on_step_end=partial(_tell, progress, begin),
            **arguments,
        )
        seconds = (sum(made.timings["denoise_s"]) + made.timings["vae_s"] + made.timings["text_encoder_s"]) / len(
            made.images
        )
        for index, image in enumerate(made.images):
            path = _free_name(output, wanted[group][index], seeds[group][index])
            try:
                save_png(image, path, made.metadata(index))
            except OSError as error:
                raise HostError(
                    f"cannot write {path}: {error.strerror}", "choose another folder with --output"
                ) from error
            saved.append(Saved(path, wanted[group][index], seeds[group][index], seconds))
        progress(len(saved), 0, 0)
    return saved


def _tell(
    progress: Progress, done: int, pipeline: Pipeline, step: int, timestep: float, kwargs: dict[str, Any]
) -> None:
    progress(done, step + 1, 0)


def _new_seed() -> int:
    import secrets

    return secrets.randbelow(2**32)


def _read_latents(path: Path) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RecipeError(f"--latents {path}: not a readable .npy file: {error}", "save it with numpy.save") from error


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise HostError(
            f"cannot write images to {output}: {error.strerror}", "choose another folder with --output"
        ) from error


def _free_name(output: Path, prompt: str, seed: int) -> Path:
    """A file name that tells prompt and seed, and overwrites nothing."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "image"
    path, number = output / f"{words}_seed{seed}.png", 2
    while path.exists():
        path, number = output / f"{words}_seed{seed}_{number}.png", number + 1
    return path
