"""A fixed set of pictures from any pipeline: every prompt from the noise of its own seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile.errors import RecipeError
from sdcompile.measure.writing import told
from sdcompile.runtime.images import pil_from_pixels
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.spec import Say

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sdcompile.bundle import Defaults
    from sdcompile.measure.contenders import Ask


NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Request:
    """How every picture of the set is asked for; picture i starts from the noise of `seed` + i."""

    seed: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    height: int
    width: int
    negative_prompt: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, defaults: Defaults, ask: Ask, seed: int) -> Request:
        """The bundle's defaults, where nothing else is asked."""
        asked = {name: getattr(defaults, name) if value is None else value for name, value in asdict(ask).items()}
        return cls(seed=seed, negative_prompt=defaults.negative_prompt, **asked)


def draw(
    pipeline: Pipeline, prompts: Sequence[str], request: Request, say: Say, options: Mapping[str, str] = NOTHING
) -> NDArray[np.float32]:
    """Pictures (N, H, W, 3) in [0, 1], as many at a time as the engines take; `options` over the pipeline's own."""
    call = {**{key: value for key, value in request.as_json().items() if key != "seed"}, **options}
    size = pipeline.model.shapes["B"].max
    made = []
    for first in range(0, len(prompts), size):
        some = prompts[first : first + size]
        say(f"picture {first + 1} of {len(prompts)}", first / len(prompts))
        seeds = [request.seed + first + index for index in range(len(some))]
        made.append(np.asarray(pipeline(list(some), seed=seeds, output_type="np", **call).images, np.float32))
    return np.concatenate(made)


def write_pictures(folder: Path, pictures: NDArray[np.float32], reference: NDArray[np.float32] | None) -> None:
    """000.png, 001.png, ... and 000-reference.png beside each. Raises HostError when `folder` cannot be written."""
    with told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, made in (("", pictures), ("-reference", reference)):
            for index, image in enumerate([] if made is None else pil_from_pixels(np.asarray(made))):
                image.save(folder / f"{index:03d}{suffix}.png")


def read_pictures(folder: Path) -> NDArray[np.float32]:
    """Every picture in `folder`, (N, H, W, 3) in [0, 1]. Raises RecipeError when there are none, or of two sizes."""
    from PIL import Image, UnidentifiedImageError

    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    try:
        arrays = [np.asarray(Image.open(path).convert("RGB"), np.float32) / 255 for path in files]
    except (OSError, UnidentifiedImageError) as error:
        raise RecipeError(f"a picture in {folder} cannot be read: {error}") from error
    if not arrays or len({array.shape for array in arrays}) > 1:
        raise RecipeError(
            f"{folder} holds {'pictures of several sizes' if arrays else 'no pictures'}",
            "name a folder of PNG, JPEG or WebP files of one size",
        )
    return np.stack(arrays)
