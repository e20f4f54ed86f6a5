"""YAML text -> plain data plus the line of every value, with all that is wrong with the text.

The only file that knows YAML. It reads the parser's events and builds the data itself, so
that a duplicate key, an alias, an anchor or a tag is a fault with a line and never runs or
multiplies anything. Scalars follow the YAML 1.2 core schema (`no`, `1:30` and dates are
text). It knows no recipe field.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_DEPTH = 32

Place = tuple[str | int, ...]
"""Where a value is: ("components", "unet", "precision")."""


class TextFault(NamedTuple):
    """Something wrong with the text itself. `line` counts from 1; `column` is 0 where it does not matter."""

    line: int
    column: int
    place: Place
    text: str


@dataclass
class Text:
    """What a text holds. `spoiled` are places whose value could not be read (faults tell why)."""

    data: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    faults: list[TextFault] = field(default_factory=list)
    spoiled: set[Place] = field(default_factory=set)
    broken: bool = False
    """True when reading stopped early: `data` is not to be used."""


class _Stop(Exception):  # noqa: N818 - a way out of the parse, not an error a user meets
    """Raised inside this file to end reading at a fault that leaves nothing to go on with."""


_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# Beyond this a number is not one anybody means, and Python itself refuses to convert 4,300 digits.
_MAX_DIGITS = 40


def scalar(text: str) -> Any:
    """The value of a plain (unquoted) scalar by the YAML 1.2 core schema, section 10.3.2 of its specification."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if len(text) <= _MAX_DIGITS:
        if _INT.fullmatch(text):
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            return int(text, base)
        if _FLOAT.fullmatch(text):
            return float(text.replace(".", "") if text[-1] in "fFnN" else text)
    return text


def read(text: str) -> Text:
    """Read one YAML document. Never raises for what `text` holds: see `Text.faults` and `Text.broken`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.reader import ReaderError

    result = Text()
    try:
        _Builder(result, YAML(typ="safe", pure=True).parse(text)).document()
    except _Stop:
        result.broken = True
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - (text.rfind("\n", 0, error.position) + 1) + 1
        character = f"character U+{ord(text[error.position]):04X}" if error.position < len(text) else "a character"
        result.faults.append(TextFault(line, column, (), f"{character} is not allowed in YAML"))
        result.broken = True
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        result.faults.append(
            TextFault(line, column, (), f"not YAML: {_problem(error.problem, error.context, text, line)}")
        )
        result.broken = True
    except (YAMLError, ValueError) as error:
        result.faults.append(TextFault(1, 1, (), f"not YAML: {error}"))
        result.broken = True
    return result


def _problem(problem: str | None, context: str | None, text: str, line: int) -> str:
    lines = text.splitlines()
    indent = re.match(r"\s*", lines[line - 1] if line <= len(lines) else "")
    if indent and "\t" in indent.group():
        return "a tab indents this line; YAML takes spaces only"
    if problem and "mapping values are not allowed" in problem:
        return "': ' inside a value; put quotes around the value"
    return " ".join(part for part in (problem, context and f"({context})") if part) or "cannot be parsed"


class _Builder:
    def __init__(self, result: Text, events: Iterator[Any]) -> None:
        self.result, self.events = result, events

    def fault(self, event: Any, place: Place, text: str) -> None:
        mark = event.start_mark
        self.result.faults.append(TextFault(mark.line + 1, mark.column + 1, place, text))

    def stop(self, event: Any, place: Place, text: str) -> None:
        self.fault(event, place, text)
        raise _Stop

    def document(self) -> None:
        from ruamel.yaml import events as ev

        documents = 0
        for event in self.events:
            if isinstance(event, ev.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self.stop(event, (), "a second document starts here; a recipe is one document (remove the '---')")
                self.result.data = self.node(next(self.events), (), 0)

    def node(self, event: Any, place: Place, depth: int) -> Any:
        from ruamel.yaml import events as ev

        self.result.lines.setdefault(place, event.start_mark.line + 1)
        if isinstance(event, ev.AliasEvent):
            self.fault(event, place, f"alias '*{event.anchor}': aliases are not read here, write the value out")
            self.result.spoiled.add(place)
            return None
        if event.anchor:
            self.fault(event, place, f"anchor '&{event.anchor}': anchors are not read here, remove it")
        if event.tag:
            tag = str(event.tag).replace("tag:yaml.org,2002:", "!!")
            self.fault(event, place, f"tag '{tag}': tags are not read here, write a plain value")
            self.result.spoiled.add(place)
        if isinstance(event, ev.ScalarEvent):
            return scalar(event.value) if event.style in (None, "") else event.value
        if depth >= MAX_DEPTH:
            self.stop(event, place[:3], f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, ev.SequenceStartEvent):
            items: list[Any] = []
            for item in self.until(ev.SequenceEndEvent):
                items.append(self.node(item, (*place, len(items)), depth + 1))
            return items
        return self.mapping(place, depth)

    def mapping(self, place: Place, depth: int) -> dict[str, Any]:
        from ruamel.yaml import events as ev

        data: dict[str, Any] = {}
        for key_event in self.until(ev.MappingEndEvent):
            if not isinstance(key_event, ev.ScalarEvent):
                self.stop(key_event, place, "a key must be a plain name")
            key = key_event.value
            key_place = (*place, key)
            if key_event.anchor or key_event.tag:
                self.fault(key_event, key_place, "a key takes no anchor and no tag")
            if key in data:
                first = self.result.lines[key_place]
                self.fault(key_event, key_place, f"duplicate key '{key}', first given on line {first}")
                # Read past the second value without letting it take the first one's place or lines.
                kept, self.result.lines = self.result.lines, {}
                self.node(next(self.events), key_place, depth + 1)
                self.result.lines = kept
                continue
            self.result.lines[key_place] = key_event.start_mark.line + 1
            data[key] = self.node(next(self.events), key_place, depth + 1)
        return data

    def until(self, end: type) -> Iterator[Any]:
        for event in self.events:
            if isinstance(event, end):
                return
            yield event
