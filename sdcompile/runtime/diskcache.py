"""Arrays on disk that only save time: one file an entry, named by a key, shared by processes, bounded in size.

A file that is damaged, or half written by a killed process, counts as not there. Files used longest ago
make room. It refuses to know what the arrays are and what a key is made of.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sdcompile.errors import HostError, RecipeError
from sdcompile.runtime import SdcompileWarning

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[Any]]

_SUFFIX, _UNFINISHED = ".npz", "writing-"
_STALE_S = 3600.0


@dataclass(frozen=True)
class DiskCache:
    """Entries below `folder`, at most `limit_bytes` of files."""

    folder: Path
    limit_bytes: int

    @classmethod
    def at(cls, folder: Path, limit_bytes: int) -> Self:
        """The cache in `folder`, which is made where it is missing.

        Raises HostError when nothing can be written there, RecipeError for a limit that holds nothing.
        """
        if limit_bytes < 1:
            raise RecipeError(
                f"a cache of {limit_bytes} bytes holds nothing", "give it a larger limit, or leave it out"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise HostError(
                f"the cache {folder} cannot be written: {error.strerror}", "choose another folder, or leave it out"
            ) from error
        return cls(folder, limit_bytes)

    def get(self, key: str) -> Arrays | None:
        """The arrays of an entry, or None when they are not there or damaged."""
        path = self._path(key)
        try:
            # Reading a member to its end compares its checksum.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            self.drop(key)
            return None
        with contextlib.suppress(OSError):  # another process may have made room
            os.utime(path)
        return arrays

    def put(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep the arrays of an entry. What cannot be written (a full disk) is not kept, with a warning."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=_UNFINISHED, delete=False) as file:
                try:
                    np.savez(file, **arrays)  # type: ignore[arg-type]
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
            Path(file.name).replace(self._path(key))
            self._make_room()
        except OSError as error:
            warnings.warn(f"nothing is kept in {self.folder}: {error.strerror}", SdcompileWarning, stacklevel=3)

    def drop(self, key: str) -> None:
        """Take an entry out, so that it is made anew."""
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _make_room(self) -> None:
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if path.suffix == _SUFFIX:
                    found.append((stat.st_mtime_ns, stat.st_size, path))
                elif path.name.startswith(_UNFINISHED) and stat.st_mtime < time.time() - _STALE_S:
                    path.unlink(missing_ok=True)  # its writer was killed
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size
