"""The values a recipe's fields may take: checks that speak in words for a person, and the types made of them.

Every check raises `fault(text)`, whose text is shown as it is. This file knows no field names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

MAX_SIDE = 1 << 16
MAX_STEPS = 1000
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl", ".pickle")


class Source(NamedTuple):
    """A source taken apart: a built-in name, a hub id with an optional revision, or a path."""

    kind: Literal["builtin", "hub", "path"]
    name: str
    revision: str | None = None


def fault(text: str) -> PydanticCustomError:
    """A validation fault whose words are shown as they are."""
    return PydanticCustomError("sdcompile", "{text}", {"text": text})


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """', did you mean 'x'?' when a known name is near, else the names there are."""
    names = list(known)
    near = get_close_matches(word.lower(), [n.lower() for n in names], n=1, cutoff=0.6)
    if near:
        return f", did you mean '{next(n for n in names if n.lower() == near[0])}'?"
    return f" (known: {', '.join(names)})" if names else ""


def _file_name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise fault(
            f"'{value}' is no safe file name: up to 100 letters, digits, '.', '_' and '-', not starting with '.' or '-'"
        )
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise fault(f"expected a whole number, got {shown(value)}")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise fault(f"expected true or false, got {shown(value)}")
    return value


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise fault(f"expected a number, got {shown(value)}")
    if not math.isfinite(value):
        raise fault(f"{value} is not a finite number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise fault(
            f"expected text, got {shown(value)}" + ("; put it in quotes" if not isinstance(value, (dict, list)) else "")
        )
    return value


def shown(value: Any) -> str:
    """A value as a recipe would write it, cut to a readable length."""
    if isinstance(value, Mapping):
        return "a mapping"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _size(value: Any) -> tuple[int, int, int]:
    numbers = value if isinstance(value, (list, tuple)) else [value] * 3
    if len(numbers) != 3:
        raise fault(f"expected one number or [min, opt, max], got {shown(value)}")
    for number in numbers:
        if _whole(number) < 1 or number > MAX_SIDE:
            raise fault(f"{number} is out of range: every size is from 1 to {MAX_SIDE}")
    low, usual, high = numbers
    if not low <= usual <= high:
        wrong = f"min {low} is above opt {usual}" if low > usual else f"opt {usual} is above max {high}"
        raise fault(f"{list(numbers)}: {wrong}; the order is [min, opt, max], as in {sorted(numbers)}")
    return (low, usual, high)


def _span(value: Any) -> tuple[int, int]:
    numbers = value if isinstance(value, (list, tuple)) else [value] * 2
    if len(numbers) != 2:
        raise fault(f"expected one number or [first, last], got {shown(value)}")
    first, last = (_whole(number) for number in numbers)
    if not 1 <= first <= last <= MAX_STEPS:
        raise fault(f"{[first, last]}: expected 1 <= first <= last <= {MAX_STEPS}")
    return (first, last)


def _source(value: str) -> str:
    try:
        parse_source(value)
    except ValueError as error:
        raise fault(str(error)) from None
    return value


def parse_source(text: str) -> Source:
    """Take a source apart. Raises ValueError with the words for a person when it can be none."""
    scheme, colon, rest = text.partition(":")
    if scheme == "builtin" and colon:
        if not NAME.fullmatch(rest):
            raise ValueError(f"'{text}': expected builtin:NAME, as in builtin:tiny")
        return Source("builtin", rest)
    if text.startswith("hf://"):
        name, at, revision = text[5:].partition("@")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or (at and not re.fullmatch(r"[\w./-]+", revision)):
            raise ValueError(f"'{text}': expected hf://org/name or hf://org/name@revision")
        return Source("hub", name, revision or None)
    if "://" in text:
        raise ValueError(f"'{text}': expected builtin:NAME, hf://org/name@revision, a folder or a .safetensors file")
    if not text.strip() or "\0" in text:
        raise ValueError(
            "the source is empty: expected builtin:NAME, hf://org/name@revision, a folder or a .safetensors file"
        )
    if text.lower().endswith(PICKLES):
        raise ValueError(
            f"'{text}' is a pickle, which can run code when it is read; only safetensors are: in diffusers, "
            "StableDiffusionPipeline.from_single_file(...).save_pretrained(FOLDER), then name FOLDER here"
        )
    return Source("path", text)


_PART = "builtin:NAME/FOLDER, hf://org/name[/FOLDER][@revision], or a folder that holds config.json and weights"


def _component_source(value: str) -> str:
    if value.startswith("builtin:"):
        if not all(NAME.fullmatch(part) for part in value.removeprefix("builtin:").partition("/")[::2]):
            raise fault(f"'{value}': expected builtin:NAME/FOLDER, as in builtin:tiny/vae_light")
    elif value.startswith("hf://"):
        if not re.fullmatch(r"hf://[\w.-]+/[\w.-]+(/\w[\w.-]*)*(@[\w./-]+)?", value):
            raise fault(f"'{value}': expected hf://org/name[/FOLDER][@revision]")
    elif "://" in value or not value.strip() or "\0" in value:
        raise fault(f"'{value}': expected {_PART}")
    elif value.lower().endswith((*PICKLES, ".safetensors")):
        raise fault(f"'{value}' is a file: expected {_PART}")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Truth = Annotated[bool, BeforeValidator(_truth)]
Number = Annotated[float, BeforeValidator(_finite)]
String = Annotated[str, BeforeValidator(_text)]
FileName = Annotated[String, AfterValidator(_file_name)]
SourceText = Annotated[String, AfterValidator(_source)]
ComponentSourceText = Annotated[String, AfterValidator(_component_source)]
_ONE = {"type": "integer", "minimum": 1}
Size = Annotated[
    tuple[int, int, int],
    BeforeValidator(_size),
    WithJsonSchema({"anyOf": [_ONE, {"type": "array", "items": _ONE, "minItems": 3, "maxItems": 3}]}),
]
Span = Annotated[
    tuple[int, int],
    BeforeValidator(_span),
    WithJsonSchema({"anyOf": [_ONE, {"type": "array", "items": _ONE, "minItems": 2, "maxItems": 2}]}),
]


class Part(BaseModel):
    """A mapping in a recipe: frozen, no unknown fields, `null` = left out."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {k: v for k, v in data.items() if v is not None or k not in cls.model_fields}
