"""What a store takes of its disk, and giving it back."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from sdcompile.store import disk

ARTIFACT = "artifact.json"

_LEFT = ("making", "unfinished")
"""Folders of what killed processes leave."""


@dataclass(frozen=True)
class Freed:
    """What `gc` freed (or would free): bytes given back to the disk, artifacts and unfinished leftovers."""

    bytes: int
    artifacts: int
    leftovers: int


@dataclass(frozen=True)
class Usage:
    """What the store holds and what is free beside it. `artifact_bytes` counts hard-linked source files too."""

    artifacts: int
    artifact_bytes: int
    leftover_bytes: int
    free_bytes: int


def usage(root: Path) -> Usage:
    objects = disk.folders(root / "objects")
    return Usage(
        len(objects),
        sum(size for folder in objects for size, _ in disk.sizes(folder)),
        sum(size for name in _LEFT for folder in disk.folders(root / name) for size, _ in disk.sizes(folder)),
        free_bytes(root),
    )


def free_bytes(root: Path) -> int:
    """Free bytes of the disk `root` is on, or would be on."""
    there = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def sweep(root: Path, stay: Collection[str], older_than_s: float | None, dry_run: bool) -> Freed:
    """Delete what is not in `stay`. The caller keeps everybody else from starting to use anything meanwhile."""
    freed = artifacts = leftovers = 0
    for folder in disk.folders(root / "objects"):
        if folder.name in stay or (older_than_s is not None and _age_s(folder) < older_than_s):
            continue
        freed += disk.freeable(folder)
        artifacts += 1
        if not dry_run:
            # One rename, so that a kill in between leaves no half artifact.
            trash = root / "making" / f"trash.{uuid4().hex}"
            trash.parent.mkdir(exist_ok=True)
            shutil.rmtree(folder.rename(trash), ignore_errors=True)
    for folder in (folder for name in _LEFT for folder in disk.folders(root / name)):
        if folder.name.partition(".")[0] in stay:
            continue
        if folder.parent.name == "unfinished" and older_than_s is not None and _quiet_s(folder) < older_than_s:
            continue
        freed += disk.freeable(folder)
        leftovers += 1
        if not dry_run:
            shutil.rmtree(folder, ignore_errors=True)
    if not dry_run:
        _sweep_small(root, stay)
    return Freed(freed, artifacts, leftovers)


def in_use(root: Path) -> set[str]:
    """Keys that living processes have registered; the notes of dead ones are removed."""
    from filelock import FileLock, Timeout

    keys: set[str] = set()
    for lock_path in sorted((root / "using").glob("*.lock")):
        note = lock_path.with_suffix(".json")
        try:
            with FileLock(lock_path, timeout=0):
                note.unlink(missing_ok=True)
            lock_path.unlink(missing_ok=True)
        except Timeout:
            if note.is_file():
                keys.update(json.loads(note.read_text(encoding="utf-8")))
    return keys


def _sweep_small(root: Path, stay: Collection[str]) -> None:
    for path in (root / "locks").glob("*.lock"):
        if path.stem not in stay:
            path.unlink(missing_ok=True)
    for path in (root / "hashes").glob("*.json"):
        source = disk.read_json(path).get("path")
        if not source or not Path(source).exists():
            path.unlink(missing_ok=True)


def _age_s(folder: Path) -> float:
    try:
        return time.time() - (folder / ARTIFACT).stat().st_mtime
    except FileNotFoundError:
        return math.inf


def _quiet_s(folder: Path) -> float:
    """Since when nothing was saved in `folder`."""
    return time.time() - max((path.stat().st_mtime for path in folder.iterdir()), default=folder.stat().st_mtime)
