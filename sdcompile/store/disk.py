"""Files and folders: hashing, writing whole or not at all, and measuring. Knows no key and no lock."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

LARGE_BYTES = 1 << 20
# Two writes inside one tick of the kernel's clock leave equal times; younger files are not remembered.
TICK_NS = 20_000_000


def signature(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, text: str) -> None:
    """Write a small file whole or not at all; the last of several writers wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        temp.write_text(text, encoding="utf-8")
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a small JSON file; {} where there is none that can be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def sizes(folder: Path) -> list[tuple[int, int]]:
    """(bytes, hard links) of every file; what vanishes while we look counts nothing."""
    found = []
    for path in folder.rglob("*"):
        try:
            stat = path.lstat()
        except FileNotFoundError:
            continue
        if not path.is_dir():
            found.append((stat.st_size, stat.st_nlink))
    return found


def freeable(folder: Path) -> int:
    """Bytes that deleting `folder` gives back: a file hard-linked elsewhere gives none."""
    return sum(size for size, links in sizes(folder) if links == 1)


def hash_file(path: Path, cache: Path) -> str:
    """sha256 of the file at `path`, remembered in the folder `cache` for large files.

    A file is known by device, inode, size and both its times, so hard links share one entry and
    a changed file is read again. A cache that cannot be written is done without.
    """
    before = signature(path)
    if before[2] < LARGE_BYTES:
        return sha256(path)
    entry = cache / f"{before[0]:x}-{before[1]:x}.json"
    known = read_json(entry)
    if known.get("signature") == list(before):
        return str(known["sha256"])
    digest = sha256(path)
    if signature(path) == before and time.time_ns() - max(before[3:]) > TICK_NS:
        with suppress(OSError):
            replace(entry, json.dumps({"signature": before, "sha256": digest, "path": str(path.absolute())}))
    return digest
