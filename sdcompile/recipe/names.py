"""Names that stand for a row of a table: checked against the tables handed over as validation context (`Known`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from sdcompile.recipe.fields import String, did_you_mean, fault


def _named(what: str, names: Iterable[str], value: str) -> str:
    if value not in (known := tuple(names)):
        raise fault(f"unknown {what} '{value}'{did_you_mean(value, known)}")
    return value


def _family(value: str, info: ValidationInfo) -> str:
    return _named("family", info.context.families, value) if info.context and info.context.families else value


def _backend(value: str, info: ValidationInfo) -> str:
    return _named("backend", info.context.backends, value) if info.context and info.context.backends else value


FamilyName = Annotated[String, AfterValidator(_family)]
BackendName = Annotated[String, AfterValidator(_backend)]
