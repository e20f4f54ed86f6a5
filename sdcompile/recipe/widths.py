"""What a recipe says of several widths of one denoiser: which passes cut each of them.

It knows the rule by which a width is named and inherits; what the passes do is theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from sdcompile.recipe.compression import PruneParams, prune_value
from sdcompile.recipe.fields import fault
from sdcompile.recipe.stepcache import cached
from sdcompile.spec import FULL, at_width

_NAME = re.compile(r"[A-Za-z0-9]{1,32}")
_TAKEN = {FULL: "the denoiser as it is", cached("").strip("_"): "the shallow stand-in of step caching"}


def _named(widths: dict[str, PruneParams]) -> dict[str, PruneParams]:
    met: set[str] = set()
    for name, passes in widths.items():
        if not _NAME.fullmatch(name):
            raise fault(f"'{name}' is no name of a width: up to 32 letters and digits, as in w75")
        if name.lower() in _TAKEN:
            raise fault(f"'{name}' is the name of {_TAKEN[name.lower()]}; give the width another one, as in w75")
        # A name is also a folder of the bundle, on any file system.
        if name.lower() in met:
            raise fault(f"'{name}' is listed twice, but for upper and lower case; give one of them another name")
        if not passes:
            raise fault(f"'{name}' names no pass, so that it would be {FULL}; as in {{{name}: {{channels: {{}}}}}}")
        met.add(name.lower())
    return widths


Widths = Annotated[dict[str, Annotated[PruneParams, BeforeValidator(prune_value)]], AfterValidator(_named)]
"""Name of a width -> the passes of the prune stage that cut it, with their parameters."""


def widths_of(components: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(component of the width, the one it is cut from, its name) for every width; `components` are models or data."""
    for base, own in components.items():
        found = own.get("widths") if isinstance(own, Mapping) else getattr(own, "widths", None)
        for width in found if isinstance(found, Mapping) else ():
            yield at_width(base, str(width)), base, str(width)
