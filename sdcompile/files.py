"""Putting files where another folder needs them without a second copy on disk, and replacing them whole.

Standard library only.
"""

from __future__ import annotations

import os
import shutil
import threading
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


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` at `path`: whoever reads it meanwhile gets all of the old bytes or all of the new. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Other processes, and other threads of this one, may write the same file.
    fresh = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        fresh.write_bytes(data)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def size_bytes(folder: Path) -> int:
    """Bytes the files below `folder` hold; several names of one file count once."""
    files = {_identity(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return sum(files.values())


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
