"""The store: folders named by what made them.

    ROOT/objects/<key>/   an artifact: the files an op wrote, and artifact.json (written last)
    ROOT/making/          work in progress; what a killed process leaves is swept, never used
    ROOT/unfinished/      what a long step saved of its work, to go on from when it is killed
    ROOT/locks/           one lock file per key being made; a process that works holds its lock
    ROOT/using/           which keys running builds rely on, so that gc leaves them alone
    ROOT/last/            recipe and step -> the parts of the key last made or used, for `explain`
    ROOT/hashes/          sha256 of large files by inode, size and times

A key is the sha256 of readable parts (op, revision, params, shapes, upstream keys, tool
versions). This room knows files, keys and locks; what a step does, or a recipe says, it
refuses to know. Artifacts may hold hard links to a source's files, so content is never
changed and no mode is set.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from sdcompile.errors import HostError, StageError
from sdcompile.store import disk, space
from sdcompile.store.keys import KEY, differences, key_of, plain
from sdcompile.store.space import ARTIFACT, Freed, Usage

__all__ = ["ARTIFACT", "Freed", "Store", "Usage", "key_of"]

FORMAT = 1

_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def wait_silently() -> None:
    """A `waiting` callback for callers that do not listen."""


class Store:
    """A store at `root`. Opening it touches nothing; the first write makes its folders.

    Raises HostError when `root` is a file, cannot be written, or its disk is full.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._damage: dict[str, str] = {}
        self._checked: dict[tuple[str, str], tuple[int, ...]] = {}
        if self.root.exists() and not self.root.is_dir():
            raise HostError(f"the store {self.root} is a file", "name a folder with --store DIR or SDCOMPILE_STORE")

    # Reading -------------------------------------------------------------------------------

    def path(self, key: str) -> Path:
        """Where the artifact of `key` is, or would be."""
        if not KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key")
        return self.root / "objects" / key

    def unfinished(self, key: str) -> Path:
        """Where the step that makes `key` may save what a killed run of it can go on from; gone once it is made."""
        return self.root / "unfinished" / self.path(key).name

    def get(self, key: str) -> Path | None:
        """The folder of a whole artifact, or None when it was never made, or is damaged (see `damage`).

        Whole means: artifact.json is there, and every file it lists has the recorded size.
        Writes nothing: `making` replaces a damaged artifact.
        """
        folder = self.path(key)
        self._damage.pop(key, None)
        try:
            files = self.facts(key)["files"]
            for relative, entry in files.items():
                size = (folder / relative).stat().st_size
                if size != entry["bytes"]:
                    self._damage[key] = f"{relative} has {size} bytes where {entry['bytes']} were written"
                    return None
        except FileNotFoundError as error:
            if folder.exists():
                self._damage[key] = f"{Path(error.filename).relative_to(folder).as_posix()} is missing"
            return None
        except (ValueError, KeyError, TypeError, AttributeError, NotADirectoryError, IsADirectoryError) as error:
            self._damage[key] = f"{ARTIFACT} cannot be read ({error})"
            return None
        except PermissionError as error:
            raise HostError(f"cannot read {error.filename} in the store", "check who owns the store") from error
        return folder

    def damage(self, key: str) -> str:
        """What is wrong with the stored artifact of `key`, in words; "" if it is whole or not there."""
        self.get(key)
        return self._damage.get(key, "")

    def facts(self, key: str) -> dict[str, Any]:
        """artifact.json of `key`: step, recipe, parts, files, seconds, peak_bytes, made_at.

        Raises OSError or ValueError where there is none that can be read.
        """
        data = json.loads((self.path(key) / ARTIFACT).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("key") != key:
            raise ValueError("not the facts of this artifact")
        return data

    def check(self, key: str) -> None:
        """Compare every byte of an artifact with what was written, before it is built upon or shipped.

        Raises StageError for a damaged or missing artifact, after taking it out of the store so
        that the next build makes it again. A file this process has found right is read again
        only if it changed since.
        """
        folder = self.get(key)
        fault = self._damage.get(key, "") if folder is None else self._altered(key, folder)
        if folder is not None and not fault:
            return
        name = self._step_of(key) or "a finished step"
        self._discard(key)
        raise StageError(
            f"{name} is damaged in the store {self.root}: {fault or 'it is missing'}",
            "it was taken out of the store; run the same command again to make it anew",
        )

    def _altered(self, key: str, folder: Path) -> str:
        for relative, entry in self.facts(key)["files"].items():
            path = folder / relative
            if self._checked.get((key, relative)) == disk.signature(path):
                continue
            if disk.sha256(path) != entry["sha256"]:
                return f"{relative} does not match the sha256 recorded when it was written"
            self._checked[key, relative] = disk.signature(path)
        return ""

    def _discard(self, key: str) -> None:
        from filelock import FileLock, Timeout

        # Somebody who holds the lock is making it anew; a store one may not write to stays as it is.
        with suppress(Timeout, OSError):
            self._folder("locks")
            self._folder("making")
            with FileLock(self.root / "locks" / f"{key}.lock", timeout=0):
                self._to_trash(self.path(key))

    def _to_trash(self, folder: Path) -> None:
        """Take a folder out by one rename, so that a kill in between leaves no half artifact."""
        if folder.exists():
            trash = self.root / "making" / f"trash.{uuid4().hex}"
            shutil.rmtree(folder.rename(trash), ignore_errors=True)

    # Writing -------------------------------------------------------------------------------

    @contextmanager
    def making(
        self,
        key: str,
        parts: Mapping[str, Any],
        step: str,
        recipe: str,
        *,
        notes: Mapping[str, Any] | None = None,
        waiting: Callable[[], None] = wait_silently,
    ) -> Iterator[Path | None]:
        """Make the artifact of `key`: yields an empty folder to write into, or None when another
        process made it while we waited for its lock.

        On leaving, the files are hashed and written through to disk, artifact.json is written
        and the folder takes its name by one rename. On any exception the folder is removed.
        `notes` (read on leaving; say {"peak_bytes": ...}) goes into artifact.json; `waiting` is
        told when another process holds the lock.

        Raises HostError when the store cannot be written or its disk is full.
        """
        folder = self.path(key)
        with self._writing():
            for name in ("objects", "making", "locks"):
                self._folder(name)
        with self.using([key]), self._locked(key, waiting):
            if self.get(key) is not None:
                yield None
                self.remember(recipe, step, key)
                return
            started = time.monotonic()
            with self._writing():
                # The lock is ours, so whatever is being made under this key belongs to a dead process.
                for stale in (self.root / "making").glob(f"{key}.*"):
                    shutil.rmtree(stale, ignore_errors=True)
                temp = self.root / "making" / f"{key}.{os.getpid()}-{uuid4().hex[:8]}"
                temp.mkdir()
            try:
                with self._writing():
                    yield temp
                    facts = {
                        "format": FORMAT,
                        "key": key,
                        "step": step,
                        "recipe": recipe,
                        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                        "seconds": round(time.monotonic() - started, 3),
                        "peak_bytes": None,
                        **(notes or {}),
                        "parts": plain(parts, "parts"),
                        "files": self._seal(temp),
                    }
                    disk.write_through(temp / ARTIFACT, json.dumps(facts, indent=1, ensure_ascii=False).encode())
                    disk.fsync(temp)
                    self._to_trash(folder)
                    temp.rename(folder)
                    disk.fsync(folder.parent)
                    shutil.rmtree(self.unfinished(key), ignore_errors=True)
            finally:
                # After the rename there is nothing left to remove.
                shutil.rmtree(temp, ignore_errors=True)
            for relative in facts["files"]:
                self._checked[key, relative] = disk.signature(folder / relative)
            self.remember(recipe, step, key)

    def _seal(self, folder: Path) -> dict[str, dict[str, Any]]:
        files: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                raise ValueError(f"the step wrote a symbolic link, {relative}: an artifact must hold its own bytes")
            if relative == ARTIFACT:
                raise ValueError(f"the step wrote {ARTIFACT}, which is the store's own")
            if path.is_dir():
                continue
            disk.fsync(path)
            files[relative] = {"bytes": path.stat().st_size, "sha256": self.hash_file(path)}
        for path in folder.rglob("*"):
            if path.is_dir():
                disk.fsync(path)
        return files

    def remember(self, recipe: str, step: str, key: str) -> None:
        """Note that this recipe's step now is `key` (for `explain`, and for what gc keeps)."""
        with self._writing():
            parts = disk.read_json(self.path(key) / ARTIFACT).get("parts")
            if parts is not None and self.last_key(recipe, step) != key:
                text = json.dumps({"key": key, "parts": parts}, ensure_ascii=False)
                disk.replace(self._last_path(recipe, step), text)
        # The time of last use, for gc by age. An artifact that is somebody else's keeps its own.
        with suppress(OSError):
            os.utime(self.path(key) / ARTIFACT)

    @contextmanager
    def using(self, keys: Collection[str]) -> Iterator[None]:
        """Keep `gc` in any process from deleting `keys` until the block is left (or this process dies)."""
        from filelock import FileLock

        folder = self.root / "using"
        name = f"{os.getpid()}-{uuid4().hex[:8]}"
        with self._writing():
            self._folder("using")
            lock = FileLock(folder / f"{name}.lock")
            # Not while gc runs: it has read who uses what already.
            with FileLock(self.root / "gc.lock"):
                lock.acquire()
                disk.replace(folder / f"{name}.json", json.dumps(sorted(keys)))
        try:
            yield
        finally:
            (folder / f"{name}.json").unlink(missing_ok=True)
            lock.release()
            (folder / f"{name}.lock").unlink(missing_ok=True)

    def _folder(self, name: str) -> None:
        try:
            (self.root / name).mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise HostError(
                f"{error.filename} is a file, where the store needs a folder",
                "name another folder with --store DIR or SDCOMPILE_STORE",
            ) from error

    @contextmanager
    def _locked(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        from filelock import FileLock, Timeout

        lock = FileLock(self.root / "locks" / f"{key}.lock")
        with self._writing():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                waiting()
                lock.acquire(poll_interval=0.1)
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn the disk's refusals into words."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full() from error
            if error.errno in _REFUSALS and self._is_ours(error.filename):
                raise HostError(
                    f"cannot write to the store {self.root}: {error.strerror} ({error.filename})",
                    "name a folder you may write to with --store DIR or SDCOMPILE_STORE",
                ) from error
            raise
        except RuntimeError as error:
            # torch and ONNX Runtime report a full disk as a RuntimeError with the system's words.
            if "No space left on device" in str(error):
                raise self._full() from error
            raise

    def _is_ours(self, name: Any) -> bool:
        return isinstance(name, (str, os.PathLike)) and Path(name).absolute().is_relative_to(self.root.absolute())

    def _full(self) -> HostError:
        return HostError(
            f"no space left for the store {self.root}: {space.free_bytes(self.root) / 1e9:.1f} GB free",
            f"free some with: sdcompile gc --store {self.root}, or name another disk with --store DIR",
        )

    # Explaining ----------------------------------------------------------------------------

    def _last_path(self, recipe: str, step: str) -> Path:
        file = step.replace(":", "-")  # of a target; a colon is no file name everywhere
        for name in (recipe, file):
            if not re.fullmatch(r"[\w.@-]+", name) or name.startswith("."):
                raise ValueError(f"{name!r} is no name of a recipe or step")
        return self.root / "last" / recipe / f"{file}.json"

    def last(self, recipe: str, step: str) -> dict[str, Any] | None:
        """The parts of the key last made or used for this step of this recipe, or None."""
        return self._last(recipe, step).get("parts")

    def last_key(self, recipe: str, step: str) -> str | None:
        """The key last made or used for this step of this recipe, or None."""
        return self._last(recipe, step).get("key")

    def last_keys(self) -> frozenset[str]:
        """The last key of every step of every recipe."""
        found = (disk.read_json(path).get("key") for path in (self.root / "last").glob("*/*.json"))
        return frozenset(key for key in found if isinstance(key, str))

    def _last(self, recipe: str, step: str) -> dict[str, Any]:
        return disk.read_json(self._last_path(recipe, step))

    def explain(
        self, old: Mapping[str, Any], new: Mapping[str, Any], names: Mapping[str, str] | None = None
    ) -> list[str]:
        """The differences between two steps' parts (say `last(...)` and a plan's) as `field.path: old -> new`.

        Where the difference is an upstream key, the upstream step is named: `names` gives the
        steps of keys that may not be made yet.
        """

        def step_of(key: str) -> str | None:
            return (names or {}).get(key) or self._step_of(key)

        return list(differences(plain(old, "parts"), plain(new, "parts"), step_of))

    def _step_of(self, key: str) -> str | None:
        try:
            return str(self.facts(key)["step"])
        except (OSError, ValueError, KeyError):
            return None

    # Space and hashes ------------------------------------------------------------------------

    def usage(self) -> Usage:
        """How much the store holds, and how much its disk has free."""
        return space.usage(self.root)

    def gc(self, keep: Collection[str] = (), older_than_s: float | None = None, dry_run: bool = False) -> Freed:
        """Delete artifacts outside `keep` and what unfinished steps saved (where `older_than_s` is given, only those
        unused for that long), leftovers of killed processes and hashes of files that are gone. What any running
        build makes or uses stays.
        """
        from filelock import FileLock

        if not self.root.is_dir():
            return Freed(0, 0, 0)
        # Nobody starts to use anything while gc.lock is held (see `using`).
        with self._writing(), FileLock(self.root / "gc.lock"):
            return space.sweep(self.root, {*keep, *space.in_use(self.root)}, older_than_s, dry_run)

    def hash_file(self, path: Path) -> str:
        """sha256 of any file (a source's weights, say); a large one that did not change is not read again."""
        return disk.hash_file(path, self.root / "hashes")
