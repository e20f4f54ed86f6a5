"""The samples form: what the fp32 reference was fed and answered, on disk.

    samples.json                     samples and trajectories: what each one is (prompt, step, shape, ...)
    <component>/<id>.safetensors     "in.sample", "in.timestep", ..., "out.out_sample" of one call
    images.safetensors               "00.latents" (unit noise), "00.final" (latents), "00.images" (B, H, W, 3);
                                     "00.source_images": what the source's own decoder makes of the same
                                     final latents, where another one is built
    pictures.safetensors             latents of pictures, and the conditioning of their captions (`write_pictures`)

The record and calibrate steps write it; verification and passes read it. One file a call, so that
writing and reading hold a single one in memory. It knows files and arrays only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sdcompile.errors import StageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

INDEX = "samples.json"
IMAGES = "images"
PICTURES = "pictures"
TOLD = "told."


@dataclass(frozen=True)
class Sample:
    """One call of a component: feeds, the reference's outputs, and what it was part of.

    told   {"id", "trajectory", "prompt", "negative_prompt", "step", "timestep", "region", "shape"}, and in a
           calibration "held_out"; step, timestep and region are None for components that run once
    """

    told: Mapping[str, Any]
    feeds: Arrays
    outputs: Arrays


class Samples:
    """The recorded calls of one component, read one at a time, so that memory holds a single call.

    `held_out` keeps those of a calibration that passes are judged by (True) or fitted to (False).
    """

    def __init__(self, folder: Path, component: str, *, held_out: bool | None = None) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.component = component
        self._folder = folder / component
        self.rows: dict[str, dict[str, Any]] = {
            row["id"]: {k: v for k, v in row.items() if k != "component"}
            for row in index["samples"]
            if row["component"] == component and held_out in (None, row.get("held_out"))
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Sample]:
        return (self[name] for name in self.rows)

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The shape of every array of a sample ("in.sample", ...), without reading the arrays."""
        with safe_open(self._folder / f"{name}.safetensors", framework="np") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping

    def __getitem__(self, name: str) -> Sample:
        """Raises StageError where a value is NaN or infinite: nothing may be fitted to that."""
        arrays = load_file(self._folder / f"{name}.safetensors")
        for key, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise StageError(f"{self.component}: recorded sample {name} holds NaN or infinite values in {key}")
        sides = {
            side: {k[len(side) + 1 :]: v for k, v in arrays.items() if k.startswith(side)} for side in ("in", "out")
        }
        return Sample(self.rows[name], sides["in"], sides["out"])


@dataclass
class Writer:
    """Puts calls into the samples form in `folder` as they come; `index` finishes it."""

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    bytes: int = 0

    def add(self, component: str, told: Mapping[str, Any], feeds: Arrays, outputs: Arrays) -> None:
        """Raises StageError where a value is NaN or infinite."""
        arrays = {f"in.{k}": v for k, v in feeds.items()} | {f"out.{k}": v for k, v in outputs.items()}
        for key, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                at = "" if told.get("step") is None else f" at step {told['step']}"
                raise StageError(
                    f"{component}: the fp32 reference has NaN or infinite values in {key}{at} of {told['prompt']!r}",
                    "the source's own weights give this: check them with diffusers",
                )
        name = f"{sum(row['component'] == component for row in self.rows):03d}"
        (self.folder / component).mkdir(exist_ok=True)
        _save(arrays, self.folder / component / f"{name}.safetensors")
        self.rows.append({"id": name, "component": component, **told})
        self.bytes += sum(array.nbytes for array in arrays.values())

    def has(self, component: str, **told: Any) -> bool:
        return any(row["component"] == component and told.items() <= row.items() for row in self.rows)

    def index(self, runs: Sequence[Mapping[str, Any]], left_out: int = 0) -> None:
        data = {"samples": self.rows, "trajectories": list(runs), "left_out": left_out}
        (self.folder / INDEX).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def trajectories(folder: Path) -> list[dict[str, Any]]:
    """What each recorded image was made with: the runtime's arguments, the shape label and the id."""
    rows: list[dict[str, Any]] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["trajectories"]
    return rows


def write_images(folder: Path, images: Mapping[str, Arrays]) -> None:
    """images: trajectory -> {"latents", "final", "images"} (and "source_images")."""
    _save({f"{t}.{k}": a for t, group in images.items() for k, a in group.items()}, folder / f"{IMAGES}.safetensors")


def image_arrays(folder: Path, trajectory: str) -> dict[str, NDArray[Any]]:
    """{"latents", "final", "images"} of one trajectory, and "source_images" where they were recorded."""
    with safe_open(folder / f"{IMAGES}.safetensors", framework="np") as file:
        names = {name for name in file.keys() if name.startswith(f"{trajectory}.")}  # noqa: SIM118 - no mapping
        return {name.removeprefix(f"{trajectory}."): file.get_tensor(name) for name in sorted(names)}


def write_pictures(folder: Path, latents: NDArray[Any], caption: NDArray[Any], conditioning: Arrays) -> None:
    """latents (N, C, h, w); caption (N,): which row of every array of `conditioning`, (captions, ...), is a picture's.

    They are kept as "latents", "caption" and "told.<name>" each.
    """
    named = {f"{TOLD}{name}": array for name, array in conditioning.items()}
    _save({"latents": latents, "caption": caption, **named}, folder / f"{PICTURES}.safetensors")


def _save(arrays: Arrays, path: Path) -> None:
    """Keys in sorted order, so that equal arrays give equal bytes."""
    save_file({key: np.ascontiguousarray(arrays[key]) for key in sorted(arrays)}, path)
