"""Prompts to conditioning arrays: tokens, text encoder, weights, and what is remembered of them.

It knows the family's `embed` and refuses to know what the denoiser does with the arrays.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from sdcompile.errors import StageError
from sdcompile.families import FAMILIES
from sdcompile.runtime.memory import remembered
from sdcompile.runtime.model import Model
from sdcompile.runtime.promptcache import PromptCache
from sdcompile.runtime.prompts import parse
from sdcompile.runtime.tokens import Chunk, Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Rows = dict[str, Floats]

RunTextEncoder = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]

_REMEMBERED = 64


@dataclass
class Counts:
    """Where prompts came from: memory, disk, or the text encoder."""

    remembered: int = 0
    read: int = 0
    computed: int = 0


@dataclass
class Embedder:
    """Embeds prompts for `model`; `run` runs its text encoder on any number of rows."""

    model: Model
    run: RunTextEncoder
    disk: PromptCache | None = None
    counts: Counts = field(default_factory=Counts)
    _memory: OrderedDict[tuple[str, str], Rows] = field(default_factory=OrderedDict)
    _tokenizer: Tokenizer | None = None

    def __call__(self, prompts: Sequence[str], weighting: str = "off") -> Rows:
        """Conditioning arrays with one row per prompt, all of the longest one's number of chunks.

        A shorter prompt is filled up with chunks of the empty one, as in the web UI.
        """
        rows = self._rows(list(dict.fromkeys(prompts)), weighting)
        lengths = {prompt: len(next(iter(row.values()))) for prompt, row in rows.items()}
        most = max(self.model.shapes["T"].min, *lengths.values())
        if min(lengths.values()) == most:
            return {name: np.stack([rows[p][name] for p in prompts]) for name in rows[prompts[0]]}
        (empty,) = self._rows([""], weighting).values()
        return {
            name: np.stack([_filled(rows[p][name], filler, most) for p in prompts]) for name, filler in empty.items()
        }

    def _rows(self, prompts: Sequence[str], weighting: str) -> dict[str, Rows]:
        """Prompt -> its arrays, (tokens, D) each; those met before are not computed again."""
        found = {p: self._memory[weighting, p] for p in prompts if (weighting, p) in self._memory}
        self.counts.remembered += len(found)
        if self.disk is not None:
            read = {p: self.disk.get(p, weighting) for p in prompts if p not in found}
            self.counts.read += sum(arrays is not None for arrays in read.values())
            found |= {prompt: arrays for prompt, arrays in read.items() if arrays is not None}
        new = self._computed([p for p in prompts if p not in found], weighting)
        self.counts.computed += len(new)
        if self.disk is not None:
            for prompt, arrays in new.items():
                self.disk.put(prompt, weighting, arrays)
        found |= new
        for prompt in prompts:
            remembered(self._memory, (weighting, prompt), _REMEMBERED, partial(dict, found[prompt]))
        return found

    def chunks(self, prompt: str, weighting: str) -> list[Chunk]:
        """What the text encoder reads for `prompt`."""
        if weighting == "off":
            return self.tokenizer.plain(prompt)
        return self.tokenizer.weighted(
            parse(prompt), max(1, self.model.shapes["T"].max // self.model.tokenizer.max_length)
        )

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.model.tokenizer_file, self.model.tokenizer)
        return self._tokenizer

    def _computed(self, prompts: Sequence[str], weighting: str) -> dict[str, Rows]:
        if not prompts:
            return {}
        chunks = {prompt: self.chunks(prompt, weighting) for prompt in prompts}
        ids = np.stack([chunk.ids for some in chunks.values() for chunk in some])
        arrays = FAMILIES[self.model.family].embed(self.run, ids)
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise StageError(
                    f"the text encoder's {name} holds values that are NaN or infinite",
                    "build the text encoder in a wider precision (bf16 or fp32)",
                )
        ends = np.cumsum([0, *map(len, chunks.values())]).tolist()
        return {
            prompt: {
                name: np.concatenate([
                    weighted(row, chunk.weights) for row, chunk in zip(array[first:last], chunks[prompt], strict=True)
                ])
                for name, array in arrays.items()
            }
            for prompt, (first, last) in zip(prompts, itertools.pairwise(ends), strict=True)
        }  # fmt: skip


def weighted(states: Floats, weights: Floats) -> Floats:
    """Hidden states (T, D) of one chunk times its tokens' weights (T,), brought back to the mean they had.

    That is what the web UI does to a prompt (there the mean is taken over the whole batch, so that
    a picture depends on its neighbours; here over the chunk alone). Without weights nothing changes.
    """
    if (weights == 1).all():
        return states
    scaled = states * weights[:, None]
    before, after = states.mean(dtype=np.float64), scaled.mean(dtype=np.float64)
    return scaled if after == 0 else (scaled * (before / after)).astype(np.float32)


def _filled(row: Floats, empty: Floats, tokens: int) -> Floats:
    return np.concatenate([row, *[empty] * ((tokens - len(row)) // len(empty))])
