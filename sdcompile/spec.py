"""The words every room shares: kinds, stages, precisions, tensor and component specs, shapes, jobs.

Standard library only, so that any room (and any test) may import it. It knows no family,
no backend and no file format.

Shape letters, used in every `TensorSpec.dims`:

    B  images in one call (VAE)              T     tokens the denoiser attends to
    R  rows of one denoiser or text-encoder  H, W  pixels
       call: images, doubled by guidance     h, w  latents

"h/2" is half of what h is: a side further down inside a denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

Kind = Literal["checkpoint", "onnx", "engine", "tokenizer", "tables", "samples", "report", "race", "effects", "bundle"]
Stage = Literal["fetch", "prune", "export", "calibrate", "quantize", "compile", "verify", "package"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]

STAGES: tuple[Stage, ...] = get_args(Stage)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

PIPELINE = "pipeline"
"""The name under which steps that belong to no single component are planned."""


def at_target(name: str, target: str) -> str:
    """How what belongs to one of several targets is called: unet@openvino. Without a target, `name` itself."""
    return f"{name}@{target}" if target else name


FULL = "full"
"""The width of a denoiser that no width was cut from."""


def at_width(component: str, width: str) -> str:
    """How one width of a denoiser is called: unet_w75. The full one has the denoiser's own name."""
    return component if width == FULL else f"{component}_{width}"


class Range(NamedTuple):
    """What one shape letter may be: smallest, most usual and largest value."""

    min: int
    opt: int
    max: int

    @property
    def is_static(self) -> bool:
        return self.min == self.max


Shapes = Mapping[str, Range]
"""Range per shape letter; bound once, by the family, when a recipe is planned."""


DEEP = "deep"
"""What a denoiser built for step caching gives besides its output, and its shallow stand-in takes: the hidden
state at which the two part (see `Family.step_cached`)."""


def split(dim: str) -> tuple[str, int]:
    """A dimension of a `TensorSpec` that is no fixed size -> its shape letter, and what that is divided by."""
    letter, _, divisor = dim.partition("/")
    return letter, int(divisor or 1)


def range_of(dim: str, shapes: Shapes) -> Range:
    """What a dimension such as "h" or "h/2" may be."""
    letter, divisor = split(dim)
    return Range(*(value // divisor for value in shapes[letter]))


@dataclass(frozen=True)
class TensorSpec:
    """One named input or output. `dims` mixes shape letters and fixed sizes; `dtype` is numpy's name."""

    name: str
    dims: tuple[str | int, ...]
    dtype: str

    def shape(self, shapes: Shapes, which: Literal["min", "opt", "max"]) -> tuple[int, ...]:
        """The concrete shape with every letter at its `min`, `opt` or `max`."""
        return tuple(getattr(range_of(d, shapes), which) if isinstance(d, str) else d for d in self.dims)

    def letters(self) -> dict[int, str]:
        """Axis number -> shape letter, for the axes that are not fixed."""
        return {axis: d for axis, d in enumerate(self.dims) if isinstance(d, str)}


@dataclass(frozen=True)
class ComponentSpec:
    """The inputs and outputs of one component, stated once.

    ONNX axes, dummy feeds, optimisation profiles, static shapes, the manifest and the
    runtime's checks are all derived from it.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def profile(self, shapes: Shapes) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Input name -> (min, opt, max) shape."""
        return {t.name: (t.shape(shapes, "min"), t.shape(shapes, "opt"), t.shape(shapes, "max")) for t in self.inputs}

    def dynamic_letters(self, shapes: Shapes) -> tuple[str, ...]:
        """The letters of the inputs that are not static, in order of appearance."""
        seen = dict.fromkeys(d for t in self.inputs for d in t.dims if isinstance(d, str))
        return tuple(letter for letter in seen if not range_of(letter, shapes).is_static)

    def as_json(self) -> dict[str, Any]:
        return {
            "inputs": [{"name": t.name, "dims": list(t.dims), "dtype": t.dtype} for t in self.inputs],
            "outputs": [{"name": t.name, "dims": list(t.dims), "dtype": t.dtype} for t in self.outputs],
        }

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> ComponentSpec:
        def tensors(rows: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(r["name"], tuple(r["dims"]), r["dtype"]) for r in rows)

        return cls(name, tensors(data["inputs"]), tensors(data["outputs"]))


Say = Callable[[str, float | None], None]
"""How a step tells of its progress: a short line, and the fraction done (None when unknown)."""


def say_nothing(text: str, fraction: float | None = None) -> None:
    """A `Say` for callers that do not listen."""


@dataclass(frozen=True)
class Job:
    """What an op is told besides its input and output folders. Everything but `say` and the last two is in the step's
    key.

    cache   a folder that outlives the step, for what only makes the next run faster (None = keep nothing)
    state   this step's own folder, which it makes when it saves what a later run may go on from; it stays when the
            step is killed and goes when the step is made (None = keep nothing)
    """

    component: str
    params: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision = "fp32"
    spec: ComponentSpec | None = None
    shapes: Shapes = field(default_factory=dict)
    configs: Mapping[str, Any] = field(default_factory=dict)
    say: Say = say_nothing
    cache: Path | None = None
    state: Path | None = None
