"""Any other YAML document of ours: checked by a pydantic model, every fault at its line, as recipes are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from sdcompile.errors import RecipeError
from sdcompile.recipe.reading import place_of, text_of
from sdcompile.recipe.words import words
from sdcompile.recipe.yamltext import Place, read

M = TypeVar("M", bound=BaseModel)


def load_document(path: Path, model: type[M], sections: Sequence[tuple[str, type[BaseModel]]] = ()) -> M:
    """The document at `path` as a `model`.

    `sections` are (field, model) of nested mappings or lists of mappings, for "did you mean". Raises
    RecipeError whose message has one `file:line: field: fault` line per fault.
    """
    parsed = read(text_of(path))
    faults = [(fault.line, fault.place, fault.text) for fault in parsed.faults]
    if not parsed.broken:
        if not isinstance(parsed.data, dict):
            faults.append((1, (), "expected a mapping of fields"))
        else:
            try:
                found = model.model_validate(parsed.data)
            except ValidationError as error:
                for item in error.errors(include_url=False):
                    place = place_of(item["loc"], parsed.data)
                    nested = next((part for name, part in sections if place[:1] == (name,) and len(place) > 1), model)
                    faults.append((_line(place, parsed.lines), place, words(item, place, tuple(nested.model_fields))))
            else:
                if not faults:
                    return found
    lines = [
        f"{path}:{line}: {'.'.join(map(str, place)) + ': ' if place else ''}{text}"
        for line, place, text in sorted(faults, key=lambda fault: fault[0])
    ]
    raise RecipeError("\n".join(lines), "correct the file")


def _line(place: Place, lines: dict[Place, int]) -> int:
    return next((lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in lines), 1)
