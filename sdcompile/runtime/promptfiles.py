"""Files of prompts: one row an image (or several), each with options of its own.

    .txt     one prompt a line; empty lines and lines that start with # are skipped
    .csv     a header line; a column `prompt`, others are names of options
    .jsonl   one JSON object a line, with the same names

Besides the names of `Options`, a row may use those of the command line: steps, size (WIDTHxHEIGHT)
and count. It refuses to know what an option means.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdcompile.errors import RecipeError
from sdcompile.runtime.options import Options

_SHORT = {"steps": "num_inference_steps", "count": "num_images_per_prompt", "negative": "negative_prompt"}
_NOT_IN_ROWS = ("latents", "output_type")


@dataclass(frozen=True)
class Row:
    """One prompt and the options it sets itself."""

    prompt: str
    options: Options = field(default_factory=Options)


def read(path: Path) -> list[Row]:
    """The rows of a file, by its ending.

    Raises RecipeError for a file that cannot be read, has another ending, or holds no row, and for
    the first row that is wrong, with its line.
    """
    readers = {".txt": _text, ".csv": _csv, ".jsonl": _jsonl}
    if path.suffix.lower() not in readers:
        raise RecipeError(f"{path}: a prompt file is one of {', '.join(readers)}", "rename it")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}", "a prompt file is UTF-8 text") from error
    rows = [_row(data, f"{path}:{line}: ") for line, data in readers[path.suffix.lower()](text, path)]
    if not rows:
        raise RecipeError(f"{path} holds no prompt")
    return rows


def size(text: str, where: str = "") -> dict[str, int]:
    """ "WxH" -> {height, width}. Raises RecipeError, beginning with `where`."""
    width, _, height = text.lower().partition("x")
    if not all(side.isascii() and side.isdigit() for side in (width, height)):
        raise RecipeError(f"{where}{text}: not a size", "write WIDTHxHEIGHT, e.g. 512x512")
    return {"height": int(height), "width": int(width)}


def _text(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, {"prompt": line.strip()}


def _csv(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    for record in reader:
        if None in record:
            raise RecipeError(
                f"{path}:{reader.line_num}: more values than columns", 'put texts with commas in "quotes"'
            )
        texts = {name.strip(): value for name, value in record.items() if value not in (None, "") or name == "prompt"}
        yield reader.line_num, {k: v if k == "prompt" else _value(v) for k, v in texts.items()}


def _value(text: str) -> Any:
    """What a cell says: a JSON number, list or mapping; else its text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _jsonl(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError as error:
            raise RecipeError(f"{path}:{number}: no JSON: {error}") from error
        if not isinstance(data, dict):
            raise RecipeError(f"{path}:{number}: a row is a JSON object", '{"prompt": "a red circle", "seed": 1}')
        yield number, data


def _row(data: Mapping[str, Any], where: str) -> Row:
    named = {_SHORT.get(key, key): value for key, value in data.items() if value is not None}
    prompt = named.pop("prompt", None)
    if not isinstance(prompt, str):
        raise RecipeError(f"{where}a row needs a prompt", "a column or key named prompt")
    if "size" in named:
        named |= size(str(named.pop("size")), where)
    if "seed" in named and (isinstance(named["seed"], bool) or not isinstance(named["seed"], int)):
        raise RecipeError(f"{where}seed={named['seed']!r} is no whole number")
    for name in _NOT_IN_ROWS:
        if name in named:
            raise RecipeError(f"{where}a row cannot set {name}")
    return Row(prompt, Options.of(named, where))
