"""A folder of pictures as latents with the conditioning of their captions: what recovery may learn on.

`describe` lists and hashes the folder when a build is planned; `run` encodes it with the fp32 reference. A caption is
a text file beside a picture, of its name; a picture without one goes with the empty prompt, as in the training of
classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile.backends import BACKENDS, Engine, Host
from sdcompile.errors import RecipeError, StageError
from sdcompile.families import FAMILIES
from sdcompile.runtime.embedding import Embedder
from sdcompile.runtime.model import Model
from sdcompile.samples import write_pictures
from sdcompile.spec import Job
from sdcompile.steps.layout import HashFile, Source, Tree, entries
from sdcompile.steps.reference import build_references, model_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
CAPTION = ".txt"

_TEXT_ENCODER, _ENCODER = "text_encoder", "vae_encoder"


def describe(folder: Path, told: str, hash_file: HashFile) -> Source:
    """The pictures below `folder`, which the recipe calls `told`, and their captions.

    Raises RecipeError when there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise RecipeError(
            f"{told} is no folder" if folder.exists() else f"{told} does not exist",
            f"name a folder of pictures ({', '.join(SUFFIXES)}); a relative path starts at the recipe's folder",
        )
    pictures = _pictures(folder)
    if not pictures:
        raise RecipeError(f"{told} holds no picture", f"pictures are files named {', '.join(SUFFIXES)}")
    captions = [caption for caption in (path.with_suffix(CAPTION) for path in pictures) if caption.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted({*pictures, *captions})}
    name = f"folder:{folder.resolve().name}"
    tree = Tree(told, name, "folder", sizes, lambda relative: folder / relative)
    return Source(name, "folder", None, None, entries(tree, sizes, hash_file), {}, place=lambda paths, say: folder)


def _pictures(folder: Path) -> list[Path]:
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES)
    return [path for path in found if path.is_file() and not path.name.startswith(".")]


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Write the pictures of `inputs["pictures"]` into `out` (see `samples.write_pictures`), at the opt size.

    inputs and job.params as for `record`, with components {"text_encoder": {params}, "vae_encoder": {}}. Pictures are
    cut at their longer sides and resized. A latent is the mean of what the encoder says. Raises StageError, naming the
    file, when a picture or a caption cannot be read, or gives a value that is NaN or infinite.
    """
    model = model_of(job.params, inputs, job)
    files = _pictures(inputs["pictures"])
    family = FAMILIES[job.params["family"]]
    reference = BACKENDS["reference"]
    with tempfile.TemporaryDirectory(dir=out, prefix="reference-") as folder:
        made = build_references(family, inputs, job, Path(folder))
        captions = [_caption(path) for path in files]
        told, conditioning = _embedded(model, reference.open(made[_TEXT_ENCODER], Host()), captions, job)
        engine = reference.open(made[_ENCODER], Host())
        latents = []
        for number, path in enumerate(files):
            job.say(f"picture {number + 1} of {len(files)}", number / len(files))
            latents.append(_latents(engine, model, path, (job.shapes["H"].opt, job.shapes["W"].opt)))
        engine.close()
    write_pictures(out, np.concatenate(latents), told, conditioning)


def _caption(picture: Path) -> str:
    path = picture.with_suffix(CAPTION)
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split()) if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise StageError(f"{path.name} is no UTF-8 text: {error}", "write the caption anew, or take it out") from error


def _embedded(
    model: Model, engine: Engine, captions: list[str], job: Job
) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
    """Of each picture, which caption it has; and of each different caption the conditioning (n, T, D)."""
    different = list(dict.fromkeys(captions))
    embed = Embedder(model, engine)
    rows: dict[str, list[NDArray[Any]]] = {}
    # A caption longer than the text encoder reads is cut, as in training; that is no reason to warn once for each.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, caption in enumerate(different):
            job.say(f"caption {number + 1} of {len(different)}", None)
            for name, array in embed([caption]).items():
                rows.setdefault(name, []).append(array)
    engine.close()
    places = {caption: number for number, caption in enumerate(different)}
    told = np.array([places[caption] for caption in captions], np.int64)
    return told, {name: np.concatenate(arrays) for name, arrays in rows.items()}


def _latents(engine: Engine, model: Model, path: Path, size: tuple[int, int]) -> NDArray[np.float32]:
    """(1, C, h, w) as the denoiser is fed them, without noise."""
    pixels = _pixels(path, size)
    (moments,) = engine({engine.inputs[0].name: pixels}).values()
    mean, _ = np.split(moments, 2, axis=1)
    latents = (mean - np.float32(model.facts["shift_factor"])) * np.float32(model.facts["scaling_factor"])
    if not np.isfinite(latents).all():
        raise StageError(f"the latents of {path.name} hold NaN or infinite values", "take this picture out")
    return latents.astype(np.float32, copy=False)


def _pixels(path: Path, size: tuple[int, int]) -> NDArray[np.float32]:
    """The picture (1, 3, H, W) in [-1, 1]; what is longer than `size`'s proportions is cut on both ends."""
    from PIL import Image, ImageOps

    height, width = size
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise StageError(f"{path.name} is no picture that can be read: {error}", "mend it, or take it out") from error
    pixels = np.asarray(fitted, np.float32).transpose(2, 0, 1)[None] / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(pixels)
