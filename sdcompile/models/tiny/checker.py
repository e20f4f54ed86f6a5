"""Scores how well a picture fits its prompt, with rulers instead of learned weights.

The background is the palette colour nearest to the border. Objects are connected regions of one
palette colour; the pixel-wise share of that colour against the background (an alpha matte) is laid
over the outline of each shape at the same centre and area, and the best overlap names the shape.
An object's shape, size and relation count only if an object of its colour is there, which is what
makes a picture with swapped colours lose. Every judgement is a ramp rather than a step, so that a
slightly worse picture scores slightly less.

The thresholds come from drawings, not from any model's pictures: a ramp ends a little before the worst
of 150 drawings (for outlines: overlap 0.87, 0.12 clear of the next shape).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from sdcompile.models.tiny import scenes
from sdcompile.models.tiny.scenes import SIZE_PX, Scene, Thing

_FRAME_PX = 2
_APART = 18.0  # CIE Lab distance from the background that makes a pixel foreground
_LEAST_PX = 24  # of area, for a region to be an object
_GRID = np.mgrid[:SIZE_PX, :SIZE_PX] + 0.5


@dataclass(frozen=True)
class Parts:
    """What `check` found, each in [0, 1]; `relation` is None where the prompt names none."""

    background: float
    count: float
    colour: float
    shape: float
    size: float
    relation: float | None
    score: float

    @property
    def strict(self) -> bool:
        """Whether nothing is wrong: every part at least 0.9."""
        parts = (self.background, self.count, self.colour, self.shape, self.size, self.relation)
        return all(part is None or part >= 0.9 for part in parts)


@dataclass(frozen=True)
class _Found:
    """One object seen: its colour by name and as it is, centre and matte."""

    colour: str
    lab: np.ndarray
    area_px: float
    x_px: float
    y_px: float
    matte: np.ndarray


def check(image: np.ndarray, prompt: str) -> Parts:
    """Score a picture (H, W, 3) against a prompt of the model's grammar; see `tiny.alignment`."""
    scene = scenes.scene_from_caption(prompt)
    levels = _levels(image)
    lab = lab_from_rgb(levels)
    ground = np.median(_border(lab), axis=0)
    background = _colour_score(ground, scene.background)
    found = _objects(levels, lab, ground)
    seen = [_seen_as(thing, found) for thing in scene.things]
    wanted, there = len(scene.things), len(found)
    count = min(wanted, there) / max(wanted, there)
    colours = [0.0 if one is None else _colour_score(one.lab, one.colour) for one in seen]
    shapes, sizes = [], []
    for thing, one in zip(scene.things, seen, strict=True):
        shapes.append(0.0 if one is None else _shape_score(one, thing.shape))
        sizes.append(0.0 if one is None else _size_score(one, thing))
    relation = _relation_score(scene, seen)
    judged = [background, *colours, *shapes, *sizes]
    if relation is not None:
        judged.append(relation)
    # Too few objects already lose their own points; too many would cost nothing without this.
    score = float(np.mean(judged)) * min(1.0, wanted / max(there, 1))
    return Parts(
        background=background,
        count=count,
        colour=float(np.mean(colours)),
        shape=float(np.mean(shapes)),
        size=float(np.mean(sizes)),
        relation=relation,
        score=score,
    )


def _levels(image: np.ndarray) -> np.ndarray:
    """The picture as (64, 64, 3) floats in [0, 255]; larger ones are averaged down."""
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image has shape {pixels.shape}, not (height, width, 3)")
    fold, rest = divmod(pixels.shape[0], SIZE_PX)
    if pixels.shape[0] != pixels.shape[1] or rest or not fold:
        raise ValueError(
            f"image is {pixels.shape[0]} x {pixels.shape[1]} px; "
            f"the checker reads squares of {SIZE_PX} px or a multiple"
        )
    levels = pixels.astype(float) * (1.0 if pixels.dtype == np.uint8 else 255.0)
    if not np.isfinite(levels).all():
        raise ValueError("image holds values that are not finite")
    return np.clip(levels.reshape(SIZE_PX, fold, SIZE_PX, fold, 3).mean((1, 3)), 0, 255)


def lab_from_rgb(levels: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) of sRGB levels in [0, 255], along the last axis (IEC 61966-2-1, CIE 15)."""
    share = np.asarray(levels, float) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / (0.9505, 1.0, 1.089)
    cube = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = cube[..., 0], cube[..., 1], cube[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


_NAMES = tuple(scenes.COLOURS)
_PALETTE = lab_from_rgb(np.array([scenes.COLOURS[name] for name in _NAMES]))


def _ramp(value: float, worst: float, best: float) -> float:
    """0 at `worst`, 1 at `best`, linear between."""
    return float(np.clip((value - worst) / (best - worst), 0.0, 1.0))


def _border(lab: np.ndarray) -> np.ndarray:
    inner = np.zeros((SIZE_PX, SIZE_PX), bool)
    inner[_FRAME_PX:-_FRAME_PX, _FRAME_PX:-_FRAME_PX] = True
    return lab[~inner]


def _colour_score(lab: np.ndarray, name: str) -> float:
    """1 for a colour that is nearest to `name` in the palette and near it, fading with distance."""
    away = np.linalg.norm(_PALETTE - lab, axis=1)
    if _NAMES[int(away.argmin())] != name:
        return 0.0
    return _ramp(away.min(), 40.0, 20.0)


def _objects(levels: np.ndarray, lab: np.ndarray, ground: np.ndarray) -> list[_Found]:
    away = np.linalg.norm(lab[:, :, None] - _PALETTE, axis=-1)
    nearest = away.argmin(axis=2)
    foreground = np.linalg.norm(lab - ground, axis=-1) > _APART
    paint = np.median(levels[~foreground], axis=0) if not foreground.all() else levels[0, 0]
    found = []
    for index, name in enumerate(_NAMES):
        # Opening drops the fringe, where an edge blends two colours into a third.
        mask = foreground & (nearest == index)
        if mask.sum() < _LEAST_PX:
            continue
        mask = ndimage.binary_opening(mask, np.ones((3, 3)))
        regions, count = ndimage.label(mask)
        for region in range(1, count + 1):
            part = regions == region
            if part.sum() < _LEAST_PX:
                continue
            colour = np.median(levels[part], axis=0)
            span = colour - paint
            matte = np.clip((levels - paint) @ span / max(span @ span, 1.0), 0.0, 1.0)
            matte = matte * ndimage.binary_dilation(part, iterations=3)
            area = matte.sum()
            found.append(
                _Found(
                    colour=name,
                    lab=lab_from_rgb(colour),
                    area_px=float(area),
                    x_px=float((matte * _GRID[1]).sum() / area),
                    y_px=float((matte * _GRID[0]).sum() / area),
                    matte=matte,
                )
            )
    return found


def _seen_as(thing: Thing, found: list[_Found]) -> _Found | None:
    """The largest object of the thing's colour. Colours of a scene differ, so this is unambiguous."""
    alike = [one for one in found if one.colour == thing.colour]
    return max(alike, key=lambda one: one.area_px, default=None)


def _measured(shape: str) -> tuple[float, float]:
    """Area and height of the centroid of a shape of radius 1, measured on a large drawing."""
    grid = np.mgrid[:256, :256] + 0.5
    mask = scenes.coverage(shape, 128.0, 128.0, 100.0, 0.0, grid)
    return float(mask.sum()) / 1e4, float((mask * (grid[0] - 128)).sum() / mask.sum()) / 100


_AREA_AND_LIFT = {shape: _measured(shape) for shape in scenes.SHAPES}


def _overlap(one: _Found, shape: str) -> float:
    """Soft intersection over union of the matte and the shape of equal area at its centre."""
    area, lift = _AREA_AND_LIFT[shape]
    radius = (one.area_px / area) ** 0.5
    x, y, reach = one.x_px, one.y_px - lift * radius, 1.2 * radius + 2
    window = (slice(max(int(y - reach), 0), int(y + reach) + 2), slice(max(int(x - reach), 0), int(x + reach) + 2))
    ideal = scenes.coverage(shape, x, y, radius, 0.0, _GRID[:, *window])
    both = np.minimum(one.matte[window], ideal).sum()
    return float(both / (one.matte.sum() + ideal.sum() - both))


def _shape_score(one: _Found, shape: str) -> float:
    overlaps = {name: _overlap(one, name) for name in scenes.SHAPES}
    own = overlaps.pop(shape)
    # Clear of the next shape, and close to the ideal outline.
    return _ramp(own - max(overlaps.values()), -0.02, 0.06) * _ramp(own, 0.60, 0.86)


def _size_score(one: _Found, thing: Thing) -> float:
    area, _ = _AREA_AND_LIFT[thing.shape]
    middle = float(np.mean(scenes.RADII_PX[thing.size]))
    return _ramp(abs((one.area_px / area) ** 0.5 - middle), 1.8, 1.1)


_TOWARDS = {
    "above": (0, -1),
    "below": (0, 1),
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "on the left": (-1, 0),
    "on the right": (1, 0),
}


def _relation_score(scene: Scene, seen: list[_Found | None]) -> float | None:
    """How far the first object stands where the prompt puts it: from the second, or in the picture."""
    if not scene.where:
        return None
    there = [one for one in seen if one is not None]
    if len(there) < len(seen):
        return 0.0
    first = there[0]
    if len(there) == 2:
        dx, dy = first.x_px - there[1].x_px, first.y_px - there[1].y_px
    else:
        dx, dy = first.x_px - SIZE_PX / 2, first.y_px - SIZE_PX / 2
    if scene.where == "in the center":
        return _ramp(max(abs(dx), abs(dy)), 10.0, 5.0)
    right, down = _TOWARDS[scene.where]
    along, across = dx * right + dy * down, abs(dx * down) + abs(dy * right)
    far = 12.0 if len(there) == 2 else 8.0
    return _ramp(along, far / 2, far) * _ramp(along - across, -4.0, 2.0)
