"""Model families: what is true of a kind of diffusion model, whatever it is compiled for.

A family is one file with one `FAMILY` record and one row in the table below. Its upper half
is plain Python and numpy and is shared with the runtime; the torch half is imported inside
`load_module`. A family knows no backend, no recipe file and no store.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.families import sd
from sdcompile.spec import FULL, ComponentSpec, Shapes

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

Configs = Mapping[str, Mapping[str, Any]]
"""The source's JSON files by folder: model_index, unet, vae, text_encoder, tokenizer, scheduler; and by
component, where a component comes from a source of its own."""

ShapeRequest = Mapping[str, tuple[int, int, int] | None]
"""(min, opt, max) as a recipe states it for batch, height, width and tokens; None = the model's own."""


@dataclass(frozen=True)
class Family:
    """A record of data and functions.

    folders            component -> folder of the source that holds its weights
    required           components every text-to-image bundle needs
    denoiser           the component called once per sampling step
    shallow            the component that stands in for it on steps that reuse deep features
    replaceable        component that may come from a source of its own -> configs -> why that one does not fit
    components         configs -> component -> ComponentSpec (checks the configs; RecipeError)
    shapes             (request, configs) -> Range per shape letter (RecipeError when illegal)
    step_cached        (configs, specs, depth) -> specs of a denoiser that also gives `spec.DEEP`, and of `shallow`,
                       which takes it (RecipeError where the denoiser cannot be cut there)
    facts              configs -> JSON-able facts the runtime needs (latents, tokens, guidance)
    load_module        (component, checkpoint folder, params) -> nn.Module whose forward takes
                       the spec's inputs in order and returns the spec's outputs
    params             component -> names of the recipe fields it understands (e.g. clip_skip)
    embed              (run text encoder, token ids (n, T) int64) -> rows of conditioning arrays
    modules            (component, configs) -> path -> kind ("conv", "linear", "norm", "embedding") of its torch
                       modules with weights; None where the configs are of a model whose modules are not known
    guidance_feeds     (facts, guidance scale, rows) -> extra denoiser inputs that depend on guidance
    """

    name: str
    folders: Mapping[str, str]
    required: tuple[str, ...]
    denoiser: str
    shallow: str
    replaceable: Mapping[str, Callable[[Configs], list[str]]]
    components: Callable[[Configs], dict[str, ComponentSpec]]
    step_cached: Callable[[Configs, Mapping[str, ComponentSpec], int], dict[str, ComponentSpec]]
    shapes: Callable[[ShapeRequest, Configs], Shapes]
    facts: Callable[[Configs], dict[str, Any]]
    load_module: Callable[[str, Path, Mapping[str, Any]], nn.Module]
    params: Mapping[str, tuple[str, ...]]
    embed: Callable[[Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]], np.ndarray], dict[str, np.ndarray]]
    modules: Callable[[str, Configs], Mapping[str, str] | None]
    guidance_feeds: Callable[[Mapping[str, Any], float, int], dict[str, np.ndarray]]

    def folder(self, component: str, there: Container[str]) -> str:
        """The folder, of those that are `there`, that holds `component`: one of its own name comes first."""
        return component if component in there else self.folders[self.plain(component)]

    def width(self, component: str) -> str | None:
        """The width of the denoiser that `component` is (see `spec.at_width`); None for one that is none."""
        if component == self.denoiser:
            return FULL
        name = component.removeprefix(f"{self.denoiser}_")
        return None if component in self.folders or name == component else name

    def widths(self, components: Iterable[str]) -> tuple[str, ...]:
        """The widths of the denoiser among `components`, in their order, the full one first."""
        found = [width for component in components if (width := self.width(component)) is not None]
        return tuple(dict.fromkeys((FULL, *found)))

    def plain(self, component: str) -> str:
        """The component, of those the family knows, that `component` is one width of; else `component`."""
        return component if self.width(component) is None else self.denoiser

    def fields(self, component: str) -> tuple[str, ...]:
        """Recipe fields that `component` understands, of those that not every component does."""
        return (
            *self.params.get(component, ()),
            *(("source",) if component in self.replaceable else ()),
            *(("step_cache", "widths") if component == self.denoiser else ()),
        )


def _record(module: Any) -> Family:
    return Family(**{name: getattr(module, name) for name in Family.__dataclass_fields__})


FAMILIES: dict[str, Family] = {m.name: _record(m) for m in (sd,)}
