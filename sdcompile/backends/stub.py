"""The backend that compiles nothing and needs nothing: numbers of the right shape from a hash.

For testing everything around an engine. Its arrays depend on every byte fed to it and on the
component's name and files, and on nothing else, so that equal requests give equal pictures. It
knows no model: its pictures are noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from sdcompile.backends.base import Backend, Card, Host, Probe, card_from_job, read_card, write_card
from sdcompile.errors import StageError
from sdcompile.files import link_tree
from sdcompile.spec import Job, TensorSpec, split

if TYPE_CHECKING:
    import numpy as np

_WEIGHTS = "checkpoint"


class Options(BaseModel):
    """The stub has no options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def probe() -> Probe:
    return Probe(available=True, version="1", devices=("none",))


def build(src: Path, out: Path, job: Job) -> None:
    """Put the checkpoint's files into `out/checkpoint` unread, and describe the engine in engine.json."""
    link_tree(src, out / _WEIGHTS)
    write_card(out, card_from_job(BACKEND.name, job))


def open_engine(folder: Path, host: Host) -> StubEngine:
    """The stub engine in `folder`. Raises StageError when there is none."""
    card = read_card(folder, BACKEND.name)
    seed = hashlib.sha256(card.component.encode())
    for path in sorted((folder / _WEIGHTS).iterdir()):
        # The size stands for the bytes: hashing gigabytes would make the stub slow for nothing.
        seed.update(f"{path.name}:{path.stat().st_size};".encode())
    return StubEngine(card, seed.digest())


class StubEngine:
    """Outputs are normal numbers of standard deviation 0.5 within [-1, 1], seeded by sha256 of the feeds."""

    def __init__(self, card: Card, seed: bytes) -> None:
        self.inputs, self.outputs = card.spec.inputs, card.spec.outputs
        self.facts: Mapping[str, Any] = {"device": "none", "precision": card.precision}
        self._card = card
        self._seed = seed

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import numpy as np

        seed = hashlib.sha256(self._seed)
        for tensor in self.inputs:
            seed.update(np.ascontiguousarray(feeds[tensor.name]).tobytes())
        random = np.random.default_rng(int.from_bytes(seed.digest(), "little"))
        letters = self._letters(feeds)
        return {
            t.name: np.clip(0.5 * random.standard_normal(self._shape(t, letters)), -1, 1).astype(t.dtype)
            for t in self.outputs
        }

    def close(self) -> None:
        pass

    def _letters(self, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
        letters: dict[str, int] = {}
        for tensor in self.inputs:
            shape = feeds[tensor.name].shape
            if len(shape) != len(tensor.dims):
                raise StageError(f"{tensor.name} has shape {shape}; the stub takes {tensor.dims}")
            for axis, (dim, size) in enumerate(zip(tensor.dims, shape, strict=True)):
                expected = letters.setdefault(dim, size) if isinstance(dim, str) else dim
                if size != expected:
                    raise StageError(f"{tensor.name} has {size} on axis {axis} where {dim} is {expected}")
        return letters

    def _shape(self, tensor: TensorSpec, letters: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(self._size(d, letters) if isinstance(d, str) else d for d in tensor.dims)

    def _size(self, letter: str, letters: Mapping[str, int]) -> int:
        """The letter as fed; H from h, W from w and back by the ratio of their built shapes; h/2 from h."""
        if letter in letters:
            return letters[letter]
        letter, divisor = split(letter)
        if divisor > 1:
            return self._size(letter, letters) // divisor
        twin = letter.swapcase()
        built = self._card.shapes
        return letters[twin] * built[letter].opt // built[twin].opt


BACKEND = Backend(
    name="stub",
    takes="checkpoint",
    realises={"fp32": (), "fp16": (), "bf16": (), "int8": ()},
    options=Options,
    probe=probe,
    build=build,
    open=open_engine,
    verifiable=False,
)
