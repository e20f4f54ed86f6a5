"""The names a recipe may use: those in the tables of this installation, or those a test hands over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel


@dataclass(frozen=True)
class Known:
    """The names the tables hold. `families`: name -> component -> recipe fields that component
    understands (e.g. clip_skip); `backends`: name -> pydantic model of its `build` options, or None.
    `prune`: pass of the prune stage -> model of its params; `quantize`: backend -> precision -> model of
    the params of the pass that quantizes to it. Names are not checked against a table left empty."""

    families: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    backends: Mapping[str, type[BaseModel] | None] = field(default_factory=dict)
    samplers: Collection[str] = ()
    prune: Mapping[str, type[BaseModel]] = field(default_factory=dict)
    quantize: Mapping[str, Mapping[str, type[BaseModel]]] = field(default_factory=dict)


def known_names() -> Known:
    """The names in the tables of this installation."""
    from sdcompile.backends import BACKENDS
    from sdcompile.families import FAMILIES
    from sdcompile.passes import PASSES, quantization
    from sdcompile.samplers import SAMPLERS

    return Known(
        {name: {c: f.fields(c) for c in f.folders} for name, f in FAMILIES.items()},
        {name: backend.options for name, backend in BACKENDS.items()},
        tuple(SAMPLERS),
        {name: record.params for name, record in PASSES.items() if record.stage == "prune"},
        {
            name: {p: record.params for p, names in b.realises.items() if (record := quantization(names))}
            for name, b in BACKENDS.items()
        },
    )
