"""The samples form: what the reference was fed and answered, on disk.

    samples.json              samples and trajectories: what each one is (prompt, step, shape, ...)
    <component>.safetensors   "003.in.sample", "003.out.out_sample", ...
    images.safetensors        "00.latents" (unit noise), "00.final" (latents), "00.images" (B, H, W, 3)

`record` writes it, `verify`, `verify_images` and calibration read it. It knows files and arrays only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

INDEX = "samples.json"
IMAGES = "images"


@dataclass(frozen=True)
class Sample:
    """One call of a component: feeds, the reference's outputs, and what it was part of.

    told   {"id", "prompt", "negative_prompt", "step", "timestep", "region", "shape"}; step, timestep
           and region are None for components that run once
    """

    told: Mapping[str, Any]
    feeds: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]


class Samples:
    """The recorded calls of one component, read one at a time, so that memory holds a single call."""

    def __init__(self, folder: Path, component: str) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.component = component
        self._path = folder / f"{component}.safetensors"
        self._rows = {row["id"]: row for row in index["samples"] if row["component"] == component}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Sample]:
        return (self[name] for name in self._rows)

    def __getitem__(self, name: str) -> Sample:
        row = self._rows[name]
        feeds: dict[str, NDArray[Any]] = {}
        outputs: dict[str, NDArray[Any]] = {}
        with safe_open(self._path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                number, side, tensor = key.split(".", 2)
                if number == name:
                    (feeds if side == "in" else outputs)[tensor] = file.get_tensor(key)
        return Sample({k: v for k, v in row.items() if k != "component"}, feeds, outputs)


def trajectories(folder: Path) -> list[dict[str, Any]]:
    """What each recorded image was made with: the runtime's arguments, the shape label and the id."""
    rows: list[dict[str, Any]] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["trajectories"]
    return rows


def image_arrays(folder: Path, trajectory: str) -> dict[str, NDArray[Any]]:
    """{"latents", "final", "images"} of one trajectory."""
    with safe_open(folder / f"{IMAGES}.safetensors", framework="np") as file:
        return {k: file.get_tensor(f"{trajectory}.{k}") for k in ("latents", "final", "images")}


def write_index(
    folder: Path, samples: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]], left_out: int
) -> None:
    data = {"samples": list(samples), "trajectories": list(runs), "left_out": left_out}
    (folder / INDEX).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_arrays(folder: Path, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write `<name>.safetensors`; keys in sorted order, so that equal arrays give equal bytes."""
    save_file({key: np.ascontiguousarray(arrays[key]) for key in sorted(arrays)}, folder / f"{name}.safetensors")
