"""Seams of tiled pictures on the tiny model: can they be seen where tiles meet? Part of generation_figures.py.

A seam is a step in brightness along a tile's edge. The figure is the mean absolute difference between the
two pixels on either side of every such edge, over that of lines four, eight and twelve pixels away (also
edges of latents, so that the decoder's own pattern counts alike), over all rows, columns and pictures. 1 is
no seam. It is taken of pictures as they are made (overlap, smooth weights), with overlap and equal weights,
and of tiles side by side, which must show one; and of the same pictures made without tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from sdcompile.runtime import images as pictures
from sdcompile.runtime import tiles
from sdcompile.runtime.tiles import Tiling

# Pixels. BEYOND is larger than what the recipe builds, and takes half of the prompts.
SIDE, TILE, BEYOND = 128, 64, 256
BATCH = 2
_AWAY = (4, 8, 12)

# How tiles are joined -> what is put in the place of tiles' own overlap and weights.
JOINS: dict[str, dict[str, Any]] = {
    "overlap, smooth weights (as it is)": {},
    "overlap, equal weights": {"ramp": lambda side: np.ones(side, np.float32)},
    "side by side": {"OVERLAP": 0.0, "ramp": lambda side: np.ones(side, np.float32)},
}


@contextmanager
def joined(how: str) -> Iterator[None]:
    with mock.patch.multiple(tiles, **JOINS[how]) if JOINS[how] else mock.patch.multiple(tiles, OVERLAP=tiles.OVERLAP):
        yield


@contextmanager
def built_up_to(pipe: Any, side: int) -> Iterator[None]:
    """The pipeline as if its engines took no more than `side` pixels, so that it makes tiles of what they can take."""
    own, factor = pipe.model, pipe.model.facts["vae_scale_factor"]
    most = {"H": side, "W": side, "h": side // factor, "w": side // factor}
    shapes = {letter: bounds._replace(max=most.get(letter, bounds.max)) for letter, bounds in own.shapes.items()}
    pipe.model = replace(own, shapes=shapes)
    try:
        yield
    finally:
        pipe.model = own


def edges(side: int, tile: int, factor: int) -> list[int]:
    """Pixels at which a tile begins or ends inside a picture, by the tiling now in force."""
    tiling = Tiling(side // factor, side // factor, tile // factor, tile // factor)
    firsts = {left for _, left in tiling.corners()}
    inside = {edge for left in firsts for edge in (left, left + tile // factor)} - {0, side // factor}
    return sorted(edge * factor for edge in inside)


def seam(images: np.ndarray, places: list[int]) -> float:
    """The figure for pictures (N, H, W, 3), square, whose tiles meet at `places`."""
    steps = sum(np.abs(np.diff(images, axis=axis)).mean(axis=(0, 3 - axis, 3)) for axis in (1, 2)) / 2
    at = {place for place in places if max(_AWAY) < place < images.shape[2] - max(_AWAY)}
    near = {place + away * side for place in at for away in _AWAY for side in (-1, 1)} - at
    # steps[x - 1] is the difference between pixels x - 1 and x.
    return float(np.mean([steps[x - 1] for x in sorted(at)]) / np.mean([steps[x - 1] for x in sorted(near)]))


def measure(pipe: Any, prompts: list[str], say: Callable[[str], None], keep: Path | None) -> list[dict[str, Any]]:
    """A row for every part that can be tiled and every way to join; writes some pictures to `keep`."""
    factor = pipe.model.facts["vae_scale_factor"]

    def latents(side: int, texts: list[str] = prompts) -> list[np.ndarray]:
        made = []
        for first in range(0, len(texts), BATCH):
            some = texts[first : first + BATCH]
            seeds = list(range(first, first + len(some)))
            output = pipe(some, seed=seeds, height=side, width=side, tiling="auto", output_type="latent")
            made.append(output.images)
        return made

    def decoded(finals: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([pictures.pixels_from_decoded(pipe.decode(final)) for final in finals])

    rows: list[dict[str, Any]] = []

    def row(part: str, how: str, made: np.ndarray, places: list[int], whole: np.ndarray | None = None) -> None:
        figure = {
            "tiled": part,
            "join": how,
            "side": made.shape[1],
            "tile_edges": places,
            "seam": round(seam(made, places), 3),
        }
        if whole is not None:
            psnr = [10 * np.log10(1 / np.mean((a - b) ** 2)) for a, b in zip(whole, made, strict=True)]
            figure["psnr_to_whole_db"] = round(float(np.mean(psnr)), 1)
        rows.append(figure)
        say(f"| {part} | {how} | {figure['seam']:.2f} | {figure.get('psnr_to_whole_db', '')} |")
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            sheet = np.concatenate(list(made[:4]), axis=1)
            name = f"{part}-{how}".translate(str.maketrans(" ,():", "_____"))
            pictures.pil_from_pixels(sheet[None])[0].save(keep / f"{name}.png")

    half = prompts[: max(1, len(prompts) // 2)]
    finals = latents(SIDE)
    whole = decoded(finals)
    for how in JOINS:
        with joined(how):
            places = edges(SIDE, TILE, factor)
            with built_up_to(pipe, TILE):
                row("VAE", how, decoded(finals), places, whole)
                tiled = latents(SIDE)
            row("denoiser", how, decoded(tiled), places)
            row(
                f"both, {BEYOND} px of {SIDE} px tiles",
                how,
                decoded(latents(BEYOND, half)),
                edges(BEYOND, SIDE, factor),
            )
        if how != "overlap, equal weights":
            row("nothing", f"edges of: {how}", whole, places)
    return rows
