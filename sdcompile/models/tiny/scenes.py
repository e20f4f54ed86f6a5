"""The world the tiny model was trained on: coloured shapes on a plain background.

A `Scene` is what a caption says; `caption` and `scene_from_caption` go back and forth; `draw` makes
one picture of it. Everything follows from the random generator passed in, so a seed names a data
set. Numpy only: the checker and the tests use this room on machines without torch.

The numbers are chosen for a picture of 64 x 64 px whose latents are 16 x 16: the smallest object is
about 17 px (4 latents) wide, and the three sizes differ by a factor of about 1.6 in area.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SIZE_PX = 64

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "green": (36, 158, 62),
    "blue": (36, 66, 214),
    "yellow": (244, 214, 40),
    "orange": (246, 128, 24),
    "purple": (138, 44, 168),
    "white": (246, 246, 246),
    "black": (18, 18, 18),
    "gray": (130, 130, 130),
    "pink": (250, 172, 204),
    "cyan": (108, 222, 232),
}
OBJECT_COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
BACKGROUNDS = ("white", "black", "gray", "pink", "cyan", "yellow", "blue", "green")
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
# Radius of each size in px, as (lowest, highest). No word means the middle size.
RADII_PX: dict[str, tuple[float, float]] = {"small": (8.5, 9.1), "": (11.0, 11.7), "large": (13.6, 14.2)}
RELATIONS = ("above", "below", "to the left of", "to the right of")
PLACES = ("in the center", "at the top", "at the bottom", "on the left", "on the right")

HELD_OUT_PERCENT = 12
SPLITS = ("train", "held_out")

_MARGIN_PX = 2.0  # between an object and the border
_GAP_PX = 3.0  # between two objects: enough for the edges of both to fade out
_SWAY_PX = 5.0  # how far a pair strays from the middle of the axis across its relation
_EDGE_PX = 1.5  # width of the anti-aliased edge
_TURN_RAD = 0.05
_TINT = 6.0  # colour jitter per channel, in levels of 255
_SLOPE = 6.0  # greatest background gradient over the picture, in levels of 255


@dataclass(frozen=True)
class Thing:
    """One object: a word of `RADII_PX`, of `OBJECT_COLOURS` and of `SHAPES`."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        words = " ".join(word for word in (self.size, self.colour, self.shape) if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """What a caption says.

    `where` is one of `RELATIONS` for two things (the first stands in that relation to the second),
    one of `PLACES` or "" (anywhere) for one thing.
    """

    background: str
    things: tuple[Thing, ...]
    where: str

    @property
    def held_out(self) -> bool:
        """Whether this composition was kept away from training.

        Two things: the unordered pair of (colour, shape), whatever sizes, relation or background;
        one thing: colour, shape and background.
        """
        words = sorted(f"{thing.colour} {thing.shape}" for thing in self.things)
        if len(self.things) == 1:
            words.append(self.background)
        digest = hashlib.md5("|".join(words).encode(), usedforsecurity=False).hexdigest()
        return int(digest[:8], 16) % 100 < HELD_OUT_PERCENT


def sample_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """One scene of a split: seven in ten have two things, always of different colours."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, not one of {', '.join(SPLITS)}")
    while True:
        background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        free = [colour for colour in OBJECT_COLOURS if colour != background]
        count = 2 if rng.random() < 0.7 else 1
        things = tuple(
            Thing(size=tuple(RADII_PX)[rng.integers(3)], colour=free[index], shape=SHAPES[rng.integers(len(SHAPES))])
            for index in rng.permutation(len(free))[:count]
        )
        if count == 2:
            where = RELATIONS[rng.integers(len(RELATIONS))]
        else:
            where = PLACES[rng.integers(len(PLACES))] if rng.random() < 0.8 else ""
        scene = Scene(background, things, where)
        if scene.held_out == (split == "held_out"):
            return scene


def caption(scene: Scene, wording: int = 0) -> str:
    """The scene in words; `wording` 0, 1 or 2 picks one of three sentences."""
    what = str(scene.things[0])
    if scene.where:
        what += f" {scene.where}"
    if len(scene.things) == 2:
        what += f" {scene.things[1]}"
    if wording == 0:
        return f"{what} on a {scene.background} background"
    if wording == 1:
        return f"{what}, {scene.background} background"
    return f"a {scene.background} background with {what}"


def sample_wording(rng: np.random.Generator) -> int:
    """The wording of a training caption: the plain sentence three times in five."""
    return int(rng.choice(3, p=(0.6, 0.2, 0.2)))


def _one_of(words: Iterable[str]) -> str:
    return "|".join(re.escape(word) for word in words if word)


_THING = rf"an? (?:({_one_of(RADII_PX)}) )?({_one_of(OBJECT_COLOURS)}) ({_one_of(SHAPES)})"
_BACKGROUND = f"({_one_of(BACKGROUNDS)}) background"
_WHAT = re.compile(rf"{_THING}(?: ({_one_of(RELATIONS)}) {_THING}| ({_one_of(PLACES)}))?")
_FRAMES = (
    re.compile(rf"(?P<what>.+) on a (?P<background>{_BACKGROUND})"),
    re.compile(rf"(?P<what>.+), (?P<background>{_BACKGROUND})"),
    re.compile(rf"a (?P<background>{_BACKGROUND}) with (?P<what>.+)"),
)


def scene_from_caption(text: str) -> Scene:
    """The scene a caption describes, in any of the three wordings; ValueError if it is none."""
    for frame in _FRAMES:
        framed = frame.fullmatch(text.strip().lower())
        found = _WHAT.fullmatch(framed["what"]) if framed else None
        if framed and found:
            size, colour, shape, relation, size_2, colour_2, shape_2, place = found.groups()
            things: tuple[Thing, ...] = (Thing(size or "", colour, shape),)
            if relation:
                things += (Thing(size_2 or "", colour_2, shape_2),)
            background = framed["background"].removesuffix(" background")
            return Scene(background, things, relation or place or "")
    raise ValueError(
        f"not a caption of the tiny model: {text!r}; "
        "say for example 'a small red circle above a large blue square on a yellow background'"
    )


# Outlines in units of the radius, y downwards. Circle and ring are drawn from their formulas.
RING_HOLE = 0.52
_ARM = 0.36


def _star() -> np.ndarray:
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.05, 0.46)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


_OUTLINES: dict[str, np.ndarray] = {
    "square": 0.88 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float),
    "triangle": np.array([(0, -0.95), (1, 0.85), (-1, 0.85)], float),
    "cross": np.array(
        [
            (-_ARM, -1),
            (_ARM, -1),
            (_ARM, -_ARM),
            (1, -_ARM),
            (1, _ARM),
            (_ARM, _ARM),
            (_ARM, 1),
            (-_ARM, 1),
            (-_ARM, _ARM),
            (-1, _ARM),
            (-1, -_ARM),
            (-_ARM, -_ARM),
        ],
        float,
    ),
    "star": _star(),
}


def coverage(shape: str, x_px: float, y_px: float, radius_px: float, turn_rad: float, grid: np.ndarray) -> np.ndarray:
    """How much of each pixel of `grid` (2, H, W: y and x of pixel centres) the shape covers, 0 to 1."""
    y, x = (grid[0] - y_px) / radius_px, (grid[1] - x_px) / radius_px
    if turn_rad:
        cos, sin = np.cos(turn_rad), np.sin(turn_rad)
        x, y = cos * x + sin * y, cos * y - sin * x
    if shape == "circle":
        distance = np.hypot(x, y) - 1
    elif shape == "ring":
        far = np.hypot(x, y)
        distance = np.maximum(far - 1, RING_HOLE - far)
    else:
        distance = _distance_to_outline(x, y, _OUTLINES[shape])
    return np.clip(0.5 - distance * radius_px / _EDGE_PX, 0.0, 1.0)


def _distance_to_outline(x: np.ndarray, y: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon, negative inside: nearest edge, sign by counting crossings."""
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
        away = (x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2
        np.minimum(nearest, away, out=nearest)
        if dy:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + dx * (y - y0) / dy)
    return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)


def place(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """(x, y, radius) in px of each thing: inside the picture, apart, and where the caption says."""
    radii = [rng.uniform(*RADII_PX[thing.size]) for thing in scene.things]
    if len(radii) == 2:
        slack = SIZE_PX - 2 * (sum(radii) + _MARGIN_PX) - _GAP_PX
        before, between, _ = rng.dirichlet((2, 1, 2)) * slack
        backwards = scene.where in ("below", "to the right of")
        first, second = reversed(radii) if backwards else radii
        start = _MARGIN_PX + before
        along = [start + first, start + 2 * first + _GAP_PX + between + second]
        across = SIZE_PX / 2 + rng.uniform(-_SWAY_PX, _SWAY_PX, size=2)
        if backwards:
            along.reverse()
        points = list(zip(along, across, strict=True))
        if scene.where in ("above", "below"):
            points = [(x, y) for y, x in points]
    else:
        free = SIZE_PX / 2 - radii[0] - _MARGIN_PX
        x, y = rng.uniform(-3, 3, size=2) if scene.where else rng.uniform(-free, free, size=2)
        edge = rng.uniform(max(free - 5, 0), free)
        if scene.where in ("at the top", "at the bottom"):
            y = -edge if scene.where == "at the top" else edge
        elif scene.where in ("on the left", "on the right"):
            x = -edge if scene.where == "on the left" else edge
        points = [(SIZE_PX / 2 + x, SIZE_PX / 2 + y)]
    return [(x, y, radius) for (x, y), radius in zip(points, radii, strict=True)]


_GRID = np.mgrid[:SIZE_PX, :SIZE_PX] + 0.5


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """One picture of the scene: (64, 64, 3) uint8."""

    def shade(colour: str) -> np.ndarray:
        return np.array(COLOURS[colour]) + rng.uniform(-_TINT, _TINT, size=3)

    direction = rng.uniform(0, 2 * np.pi)
    ramp = np.cos(direction) * _GRID[1] + np.sin(direction) * _GRID[0]
    ramp = (ramp - ramp.mean()) * rng.uniform(0, _SLOPE) / SIZE_PX
    picture = shade(scene.background) + ramp[..., None]
    for thing, (x, y, radius) in zip(scene.things, place(scene, rng), strict=True):
        turn = rng.uniform(-_TURN_RAD, _TURN_RAD)
        alpha = coverage(thing.shape, x, y, radius, turn, _GRID)[..., None]
        picture = picture + alpha * (shade(thing.colour) - picture)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
