"""The word every pass shares: its record. Knows no pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdcompile.spec import Job, Kind, Stage

if TYPE_CHECKING:
    from pydantic import BaseModel


@dataclass(frozen=True)
class Pass:
    """One rewriting of a model: it reads the form `kind` and writes the same form.

    kind       "checkpoint" or "onnx": the role of its input folder and the form of its output
    stage      the command that makes it
    revision   to be raised whenever the bytes it writes for the same input change
    params     pydantic model of what the recipe may tell it
    run        (inputs, out, job), as every op
    packages   distributions whose versions decide those bytes
    """

    name: str
    stage: Stage
    kind: Kind
    revision: int
    params: type[BaseModel]
    run: Callable[[Mapping[str, Path], Path, Job], None]
    packages: tuple[str, ...] = ()
