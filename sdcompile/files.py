"""Putting files where another folder needs them without a second copy on disk.

Standard library only.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link, or a copy where the disks differ."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def link_tree(source: Path, target: Path) -> None:
    """`link` every file below the folder `source` to the same place below `target`.

    Names of one file stay names of one file, also where the disks differ.
    """
    placed: dict[tuple[int, int], Path] = {}
    for path in sorted(source.rglob("*")):
        if path.is_file():
            there = target / path.relative_to(source)
            link(placed.setdefault(_identity(path), path), there)
            placed[_identity(path)] = there


def size_bytes(folder: Path) -> int:
    """Bytes the files below `folder` hold; several names of one file count once."""
    files = {_identity(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return sum(files.values())


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
