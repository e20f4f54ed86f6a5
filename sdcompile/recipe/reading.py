"""A recipe file and `--set` overlays -> a Recipe, or every fault at once as `file:line: field: fault`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from sdcompile.errors import RecipeError
from sdcompile.recipe.fields import shown
from sdcompile.recipe.known import Known, known_names
from sdcompile.recipe.model import Recipe, cross_faults
from sdcompile.recipe.tables import is_unknown_name, table_faults
from sdcompile.recipe.words import kind_of, words
from sdcompile.recipe.yamltext import Place, Text, read

MAX_BYTES = 1 << 20
MAX_SHOWN = 40

# Fields the cross-field faults look at: none is required, so they can be checked beside faulty others.
_CROSSED = ("samplers", "sampler_steps", "defaults", "profiles", "shapes")
_PLACEHOLDERS = {"version": 1, "name": "x", "family": "x", "source": "x", "backend": "x"}


def load(path: str | Path, sets: Iterable[str] = (), known: Known | None = None) -> Recipe:
    """Read the recipe at `path`, lay the `--set` values over it, and check all of it.

    `sets` are "a.b=value" texts; the value is YAML, empty = unset, a list is entered by index
    (`samplers.0=ddim`; the index after the last appends). `known` are the names to check
    against (default: this installation's tables).

    Raises RecipeError whose message has one `file:line: field: fault` line per fault.
    """
    path = Path(path)
    reading = _Reading(str(path), text_of(path), known or known_names())
    for assignment in sets:
        reading.lay_over(assignment)
    recipe = reading.recipe()
    recipe._folder = path.parent
    recipe._origins = {".".join(map(str, place)): where for place, where in reading.origin.items()}
    return recipe


def text_of(path: Path) -> str:
    """The text of a YAML file. Raises RecipeError when it cannot be read, is too large or is not UTF-8."""
    try:
        if path.is_dir():
            raise RecipeError(f"{path} is a folder; a recipe is a YAML file", f"name the file: {path / 'recipe.yaml'}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(
            f"there is no recipe {path}", "check the path, or start one: sdcompile init NAME.yaml"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"cannot read the recipe {str(path)!r}: {reason}", "check the path and its permissions"
        ) from error
    if len(data) > MAX_BYTES:
        raise RecipeError(
            f"{path} is larger than {MAX_BYTES >> 20} MiB; that is no recipe", "name the recipe's YAML file"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # With a byte order mark in front the codec counts from behind it.
        at = error.start + (3 if data.startswith(b"\xef\xbb\xbf") and len(error.object) < len(data) else 0)
        line = data.count(b"\n", 0, at) + 1
        raise RecipeError(
            f"{path}:{line}: the text is not UTF-8: byte 0x{data[at]:02x} at offset {at}",
            "save the file as UTF-8 (not UTF-16 or Latin-1)",
        ) from None


class _Reading:
    """One attempt to read a recipe: the data so far, where each value came from, and the faults."""

    def __init__(self, file: str, text: str, known: Known) -> None:
        self.file, self.known = file, known
        self.faults: list[tuple[str, str, str]] = []
        self.spoiled: set[Place] = set()
        parsed = read(text)
        self.origin: dict[Place, str] = {place: f"{file}:{line}" for place, line in parsed.lines.items()}
        for fault in parsed.faults:
            column = f":{fault.column}" if fault.column and not fault.place else ""
            self.add(f"{file}:{fault.line}{column}", fault.place, fault.text)
        if parsed.broken:
            self.refuse()
        self.spoiled |= parsed.spoiled
        if parsed.data is None:
            self.add(f"{file}:1", (), "the recipe is empty")
            self.refuse(f"start one: sdcompile init {file}")
        if not isinstance(parsed.data, dict):
            self.add(self.origin[()], (), f"a recipe is a mapping of fields, got {kind_of(parsed.data)}")
            self.refuse()
        self.data: dict[str, Any] = parsed.data

    def add(self, where: str, place: Place, text: str) -> None:
        # One fault a place and text: a name may be reached by two checks.
        row = (where, ".".join(map(str, place)), text)
        if row not in self.faults:
            self.faults.append(row)

    def add_at(self, place: Place, text: str) -> None:
        """Add a fault where `place` was written, or where the nearest thing around it was."""
        if any(place[:n] in self.spoiled for n in range(len(place) + 1)):
            return
        near = next((place[:n] for n in range(len(place), -1, -1) if place[:n] in self.origin), ())
        self.add(self.origin.get(near, f"{self.file}:1"), place, text)

    def refuse(self, hint: str = "") -> NoReturn:
        lines = [
            f"{where}: {field + ': ' if field else ''}{text}"
            for where, field, text in sorted(self.faults, key=_by_line)
        ]
        if len(lines) > MAX_SHOWN:
            lines[MAX_SHOWN:] = [f"... and {len(lines) - MAX_SHOWN} more"]
        raise RecipeError("\n".join(lines), hint or "correct the recipe; its fields: sdcompile schema")

    def lay_over(self, assignment: str) -> None:
        """Put one `--set a.b=c` into the data."""
        where = f"--set {assignment}"
        dotted, equals, text = assignment.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            self.add(where, (), "expected FIELD=VALUE, as in --set components.unet.precision=fp16")
            return
        parsed: Text = read(text)
        for fault in parsed.faults:
            self.add(where, tuple(keys), fault.text)
        if parsed.broken or parsed.faults:
            self.spoiled.add(tuple(keys))
            return
        parent: Any = self.data
        place: Place = ()
        for key, following in zip(keys, (*keys[1:], None), strict=True):
            step = self._step(parent, key, place, where)
            if step is None:
                return
            place = (*place, step)
            if following is None:
                self._put(parent, step, parsed.data)
                for old in [p for p in self.origin if p[: len(place)] == place]:
                    del self.origin[old]
                self.spoiled = {p for p in self.spoiled if p[: len(place)] != place}
                self.origin[place] = where
            else:
                if (isinstance(parent, list) and step == len(parent)) or (
                    isinstance(parent, dict) and parent.get(step) is None
                ):
                    self._put(parent, step, {})
                    self.origin[place] = where
                parent = parent[step]

    def _step(self, parent: Any, key: str, place: Place, where: str) -> str | int | None:
        if isinstance(parent, dict):
            return key
        if isinstance(parent, list):
            if re.fullmatch("[0-9]{1,9}", key) and int(key) <= len(parent):
                return int(key)
            self.add(
                where, place, f"has entries 0 to {len(parent) - 1}; '{key}' is none of them ({len(parent)} appends)"
            )
            return None
        self.add(where, place, f"is {shown(parent)}, so it has no field '{key}'")
        return None

    @staticmethod
    def _put(parent: Any, step: str | int, value: Any) -> None:
        if isinstance(parent, list) and step == len(parent):
            parent.append(value)
        else:
            parent[step] = value

    def recipe(self) -> Recipe:
        """Validate. Faults of fields, of names in tables, and between fields come out together."""
        result: Recipe | None = None
        faulty: set[Place] = set()
        try:
            result = Recipe.model_validate(self.data, context=self.known)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                if item["type"] == "too_short" and item["input"]:
                    # pydantic counts only sound entries; the faulty ones are told of anyway.
                    continue
                place = place_of(item["loc"], self.data)
                faulty.add(place)
                if not is_unknown_name(self.data, self.known, place):
                    self.add_at(place, words(item, place))
        partial = result or Recipe.model_validate({**_PLACEHOLDERS, **_sound(self.data, faulty)}, context=Known())
        for fault in cross_faults(partial):
            if not any(_same_branch(place, behind) for behind in fault.behind for place in faulty):
                self.add_at(fault.place, fault.text)
        for place, text in table_faults(self.data, self.known):
            self.add_at(place, text)
        if self.faults or result is None:
            self.refuse()
        return result


def _sound(data: dict[str, Any], faulty: set[Place]) -> dict[str, Any]:
    """The fields that cross-field faults look at, without their own faulty values."""
    sound = {key: copy.deepcopy(data[key]) for key in _CROSSED if key in data and (key,) not in faulty}
    for place in sorted(faulty, key=len, reverse=True):
        if place[0] == "samplers" and len(place) > 1 and "samplers" in sound:
            sound["samplers"][place[1]] = f"faulty-{place[1]}"
        elif len(place) == 2 and isinstance(sound.get(str(place[0])), dict):
            sound[str(place[0])].pop(place[1], None)
    return sound


def _same_branch(a: Place, b: Place) -> bool:
    return a[: len(b)] == b[: len(a)]


def place_of(loc: tuple[Any, ...], data: Any) -> Place:
    """pydantic's location without the parts it makes up (union branches, validator names)."""
    place: list[str | int] = []
    here = data
    for index, key in enumerate(loc):
        if isinstance(here, dict) and (key in here or index == len(loc) - 1):
            here = here.get(key)
            place.append(key)
        elif isinstance(here, list) and isinstance(key, int) and key < len(here):
            here = here[key]
            place.append(key)
    return tuple(place)


def _by_line(row: tuple[str, str, str]) -> tuple[bool, int]:
    """Faults in the order of the file, then those of --set in the order given (sorting is stable)."""
    at = re.search(r":(\d+)(:\d+)?$", row[0])
    return (row[0].startswith("--set "), 0) if row[0].startswith("--set ") or not at else (False, int(at.group(1)))
