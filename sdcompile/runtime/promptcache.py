"""Prompt embeddings on disk, shared by processes: one file each, named by text encoder, weighting and prompt.

A file that is damaged, or half written by a killed process, is computed anew. Files used longest
ago make room.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = dict[str, NDArray[np.float32]]

_SUFFIX = ".npz"


@dataclass(frozen=True)
class PromptCache:
    """Embeddings below `folder`, made by the text encoder of digest `encoder`; at most `limit_bytes` of files."""

    folder: Path
    encoder: str
    limit_bytes: int = 256 << 20

    def get(self, prompt: str, weighting: str) -> Rows | None:
        """The arrays of a prompt, or None when they are not there or damaged."""
        path = self._path(prompt, weighting)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # another process may have made room
            os.utime(path)
        return arrays

    def put(self, prompt: str, weighting: str, arrays: Rows) -> None:
        """Keep the arrays of a prompt. Raises OSError when the folder cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="writing-", delete=False) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        Path(file.name).replace(self._path(prompt, weighting))
        self._make_room()

    def _path(self, prompt: str, weighting: str) -> Path:
        key = hashlib.sha256("\0".join((self.encoder, weighting, prompt)).encode("utf-8", "surrogatepass"))
        return self.folder / f"{key.hexdigest()}{_SUFFIX}"

    def _make_room(self) -> None:
        found = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size
