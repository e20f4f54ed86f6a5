"""Modules named by pattern: one language for every field of a recipe that names some.

A pattern is a dotted path in which `*` stands for any part of one name and `**` for any names. It may start anywhere
(`attn2.to_q`, `down_blocks.0`, `mid_block.**.ff`), and means what lies at or under what it names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

HINT = "`*` is any part of one name, `**` any names"


def covered(paths: Iterable[str], pattern: str) -> set[str]:
    """Those of the module paths that lie at or under what `pattern` names."""
    parts = (".*" if p == "**" else "[^.]*" if p == "*" else re.escape(p) for p in re.split(r"(\*\*|\*)", pattern))
    regex = re.compile(rf"(?:.*\.)?{''.join(parts)}(?:\..*)?")
    return {path for path in paths if regex.fullmatch(path)}


def named(paths: Collection[str], patterns: Iterable[str]) -> set[str]:
    """Those of the module paths that any of `patterns` covers."""
    return {path for pattern in patterns for path in covered(paths, pattern)}


def fault_of(paths: Collection[str], patterns: Iterable[str], what: str) -> str:
    """Which `patterns` cover none of `paths`, which are a `what` each; "" where each covers one."""
    unmatched = [pattern for pattern in patterns if not covered(paths, pattern)]
    if not unmatched:
        return ""
    some = ", ".join(list(dict.fromkeys(paths))[:3])
    return f"{', '.join(map(repr, unmatched))} matches no {what}; they are named as {some}, ..."
