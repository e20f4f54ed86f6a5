"""The document of a layered experiment: a base recipe, overlays one on top of the other, and what to choose by."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sdcompile.errors import RecipeError
from sdcompile.recipe import load_document
from sdcompile.recipe.fields import FileName, Number, String, Whole

Count = Annotated[Whole, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class BenchPart(_Part):
    """How the bundles are timed (see `sdcompile bench --help`)."""

    processes: Count = 2
    images: Count = 5
    threads: Count | None = None
    batch: tuple[Count, ...] = ()


class EvalPart(_Part):
    """How the pictures are judged (see `sdcompile eval --help`)."""

    prompts: Count = 64
    prompts_file: String | None = None
    seed: Annotated[Whole, Field(ge=0)] = 2024
    reference: bool = True


class Layer(_Part):
    """One layer: `set` on top of the layer before, or of the layer named by `from`, or of another `base` recipe."""

    name: String
    set: tuple[String, ...] = ()
    after: String | None = Field(default=None, alias="from")
    base: String | None = None


class Pick(_Part):
    """The layer to choose: the fastest whose mean figure is `at_least` times that of the first layer."""

    figure: Literal["alignment", "psnr_db", "ssim"] = "alignment"
    at_least: Annotated[Number, Field(gt=0)] = 0.95


class Experiment(_Part):
    """The whole document."""

    version: Literal[1]
    name: FileName
    base: String
    source: String | None = None
    bench: BenchPart = BenchPart()
    eval: EvalPart = EvalPart()
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)]
    pick: Pick = Pick()


class Planned(_Part):
    """A layer as a recipe file and every `--set` that leads to it; `bundle` is the name it is built under."""

    name: str
    bundle: str
    recipe: Path
    sets: tuple[str, ...]


def load(path: Path) -> tuple[Experiment, list[Planned]]:
    """The experiment at `path`, with its layers in the order of the file.

    Raises RecipeError with every fault of the document.
    """
    found = load_document(
        path, Experiment, (("layers", Layer), ("bench", BenchPart), ("eval", EvalPart), ("pick", Pick))
    )
    planned: dict[str, Planned] = {}
    last: Planned | None = None
    for number, layer in enumerate(found.layers):
        if layer.name in planned:
            raise RecipeError(f"{path}: two layers are called '{layer.name}'", "give one of them another name")
        if layer.after is not None and layer.after not in planned:
            raise RecipeError(
                f"{path}: layer '{layer.name}' stands on '{layer.after}', which no layer before it is called",
                f"layers so far: {', '.join(planned) or 'none'}",
            )
        below = planned[layer.after] if layer.after is not None else last
        if layer.base is not None or below is None:
            recipe, sets = path.parent / (layer.base or found.base), _source(found)
        else:
            recipe, sets = below.recipe, below.sets
        bundle = f"{found.name}-{number:02d}-{_slug(layer.name)}"[:100]
        last = Planned(name=layer.name, bundle=bundle, recipe=recipe, sets=(*sets, *layer.set))
        planned[layer.name] = last
    return found, list(planned.values())


def _source(found: Experiment) -> tuple[str, ...]:
    return () if found.source is None else (f"source={found.source}",)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "layer"
