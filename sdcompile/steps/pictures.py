"""A folder of pictures as latents with the conditioning of their captions: what recovery may learn on.

`describe` lists and hashes the folder when a build is planned; `run` encodes it with the fp32 reference. A caption is
a text file beside a picture, of its name; a picture without one goes with the empty prompt, as in the training of
classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598).
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile.backends import BACKENDS, Engine, Host
from sdcompile.bundle import TokenizerEntry
from sdcompile.errors import RecipeError, StageError
from sdcompile.families import FAMILIES
from sdcompile.runtime.conditions import picture
from sdcompile.runtime.tokens import Tokenizer
from sdcompile.samples import write_pictures
from sdcompile.spec import ComponentSpec, Job
from sdcompile.steps.layout import CAPTION, HashFile, Source, Tree, entries

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


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
    bare = len(pictures) - len({path.with_suffix("") for path in captions})
    notes = (f"{told}: {bare} of {len(pictures)} pictures have no caption ({CAPTION} beside them), so no prompt",)
    return Source(
        name, "folder", None, None, entries(tree, sizes, hash_file), {}, notes if bare else (),
        place=lambda paths, say: folder,
    )  # fmt: skip


def _pictures(folder: Path) -> list[Path]:
    """In the order of their names; what is hidden, or in a hidden folder, is none."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Write the pictures of `inputs["pictures"]` into `out` (see `samples.write_pictures`).

    inputs: also text_encoder and vae (checkpoints), tokenizer. job.params: family, components {"text_encoder",
    "vae_encoder": {"params", "spec"}}, size {height, width}, scaling_factor, shift_factor. Pictures are cut at their
    longer sides and resized. A latent is the mean of what the encoder says. Raises StageError, naming the file, when
    a picture or a caption cannot be read, or gives a value that is NaN or infinite.
    """
    files = _pictures(inputs["pictures"])
    captions = [_caption(path) for path in files]
    with tempfile.TemporaryDirectory(dir=out, prefix="reference-") as scratch:
        told, conditioning = _embedded(captions, inputs, Path(scratch), job)
        engine = _reference("vae_encoder", inputs["vae"], Path(scratch), job)
        latents = np.empty(0)
        for number, path in enumerate(files):
            job.say(f"picture {number + 1} of {len(files)}", number / len(files))
            one = _latents(engine, path, job.params)
            # In one array from the beginning: a list of them would have to be copied.
            latents = latents if number else np.empty((len(files), *one.shape[1:]), np.float32)
            latents[number] = one[0]
        engine.close()
    write_pictures(out, latents, told, conditioning)


def _reference(component: str, checkpoint: Path, scratch: Path, job: Job) -> Engine:
    """The fp32 torch module of `component` as an engine."""
    made, told = scratch / component, job.params["components"][component]
    made.mkdir()
    params, spec = {"family": job.params["family"], **told["params"]}, ComponentSpec.from_json(component, told["spec"])
    BACKENDS["reference"].build(checkpoint, made, Job(component, params, spec=spec))
    return BACKENDS["reference"].open(made, Host())


def _caption(picture: Path) -> str:
    path = picture.with_suffix(CAPTION)
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split()) if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise StageError(f"{path.name} is no UTF-8 text: {error}", "write the caption anew, or take it out") from error


def _embedded(
    captions: list[str], inputs: Mapping[str, Path], scratch: Path, job: Job
) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
    """Of each picture, which caption it has; and of each different caption the conditioning (n, T, D)."""
    different = list(dict.fromkeys(captions))
    entry = json.loads((inputs["tokenizer"] / "entry.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer(inputs["tokenizer"] / "tokenizer.json", TokenizerEntry(file="tokenizer.json", **entry))
    engine = _reference("text_encoder", inputs["text_encoder"], scratch, job)
    rows: dict[str, NDArray[Any]] = {}
    # A caption longer than the text encoder reads is cut, as in training; that is no reason to warn once for each.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, caption in enumerate(different):
            job.say(f"caption {number + 1} of {len(different)}", None)
            for name, array in FAMILIES[job.params["family"]].embed(engine, tokenizer.ids([caption])).items():
                if not np.isfinite(array).all():
                    raise StageError(f"the text encoder gives NaN or infinite values for {caption!r}")
                rows.setdefault(name, np.empty((len(different), *array.shape[1:]), array.dtype))[number] = array[0]
    engine.close()
    places = {caption: number for number, caption in enumerate(different)}
    return np.array([places[caption] for caption in captions], np.int64), rows


def _latents(engine: Engine, path: Path, params: Mapping[str, Any]) -> NDArray[np.float32]:
    """(1, C, h, w) as the denoiser is fed them, without noise."""
    pixels = _pixels(path, params["size"]["height"], params["size"]["width"])
    (moments,) = engine({engine.inputs[0].name: pixels}).values()
    mean, _ = np.split(moments, 2, axis=1)
    latents = (mean - np.float32(params["shift_factor"])) * np.float32(params["scaling_factor"])
    if not np.isfinite(latents).all():
        raise StageError(f"the latents of {path.name} hold NaN or infinite values", "take this picture out")
    return latents.astype(np.float32, copy=False)


def _pixels(path: Path, height: int, width: int) -> NDArray[np.float32]:
    """The picture (1, 3, H, W) in [-1, 1]; what is longer than these proportions is cut on both ends."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            fitted = ImageOps.fit(_opaque(ImageOps.exif_transpose(opened)), (width, height), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow's words for a format it does not know are a path in the store, which nobody has put there.
        why = "damaged, or another format" if isinstance(error, UnidentifiedImageError) else error
        raise StageError(f"{path.name} is no picture that can be read: {why}", "mend it, or take it out") from error
    return picture("the picture", fitted, height, width)


def _opaque(image: Image) -> Image:
    """In RGB: 16 bits become 8, which pillow would clip to white, and what is transparent white."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.uint32).clip(0, 65535) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
