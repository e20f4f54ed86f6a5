"""The store: whole artifacts or none, made once, explained and collected."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdcompile.errors import HostError, StageError
from sdcompile.store import Store, disk, key_of

PARTS = {"op": "onnx", "params": {"opset": 20}}
KEY = key_of(PARTS)
STEP = "unet.export.onnx"


def make(store: Store, parts: dict[str, Any] = PARTS, step: str = STEP, files: dict[str, bytes] | None = None) -> Path:
    key = key_of(parts)
    with store.making(key, parts, step, "r") as out:
        assert out is not None
        for name, data in (files or {"model.onnx": b"graph", "sub/w.bin": b"weights"}).items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
    made = store.get(key)
    assert made is not None
    return made


def try_making(store: Store, action: Callable[[Path], Any]) -> None:
    """`action` on the folder KEY is made in; what it raises comes out."""
    with store.making(KEY, PARTS, STEP, "r") as out:
        assert out is not None
        action(out)


def raising(error: BaseException) -> Callable[[Path], None]:
    """Writes half an artifact, then raises."""

    def action(out: Path) -> None:
        (out / "half").write_text("half")
        raise error

    return action


def leftovers(store: Store) -> list[Path]:
    return sorted((store.root / "making").iterdir())


# Keys


def test_a_key_depends_on_values_and_not_on_order() -> None:
    assert key_of({"a": 1, "b": [1, 2]}) == key_of({"b": (1, 2), "a": 1})
    assert len(KEY) == 64
    for other in ({"a": 1.0}, {"a": "1"}, {"a": True}, {"a": None}, {"a": [1]}, {"b": 1}):
        assert key_of(other) != key_of({"a": 1})


@pytest.mark.parametrize(
    ("parts", "fault"),
    [
        ({"a": {"b": float("nan")}}, "parts.a.b is nan"),
        ({"a": [1, float("inf")]}, "parts.a.1 is inf"),
        ({"a": Path("x")}, "parts.a is a PosixPath"),
        ({"a": {1}}, "parts.a is a set"),
        ({"a": b"x"}, "parts.a is a bytes"),
        ({"a": {1: 2}}, "parts.a has the key 1"),
    ],
)
def test_a_key_refuses_what_json_cannot_hold_exactly(parts: dict[str, Any], fault: str) -> None:
    with pytest.raises((TypeError, ValueError), match=fault):
        key_of(parts)


# Making


def test_an_artifact_is_whole_and_says_what_made_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    assert store.get(KEY) is None
    notes: dict[str, Any] = {}
    with store.making(KEY, PARTS, STEP, "r", notes=notes) as out:
        assert out is not None
        assert store.get(KEY) is None
        (out / "a.txt").write_text("hi")
        notes.update(seconds=3.5, peak_bytes=1000)
    made = store.get(KEY)
    assert made == store.path(KEY)
    facts = store.facts(KEY)
    assert facts["parts"] == PARTS
    assert (facts["step"], facts["recipe"], facts["seconds"], facts["peak_bytes"]) == (STEP, "r", 3.5, 1000)
    assert facts["files"] == {"a.txt": {"bytes": 2, "sha256": disk.sha256(made / "a.txt")}}
    assert leftovers(store) == []
    assert list((store.root / "using").iterdir()) == []


def test_nothing_is_written_before_something_is_made(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    assert store.get(KEY) is None
    assert store.damage(KEY) == ""
    assert store.last("r", STEP) is None
    assert store.last_keys() == frozenset()
    assert store.usage().artifacts == 0
    assert store.gc().bytes == 0
    assert not store.root.exists()


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), MemoryError()])
def test_an_exception_inside_making_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    store = Store(tmp_path)
    with pytest.raises(type(error)):
        try_making(store, raising(error))
    assert store.get(KEY) is None
    assert leftovers(store) == []
    make(store)


def test_what_is_made_already_is_not_made_again(tmp_path: Path) -> None:
    make(Store(tmp_path))
    with Store(tmp_path).making(KEY, PARTS, STEP, "other") as out:
        assert out is None
    assert Store(tmp_path).last("other", STEP) == PARTS


def test_a_step_may_write_neither_links_nor_the_stores_own_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="symbolic link, x"):
        try_making(store, lambda out: (out / "x").symlink_to("/etc/hosts"))
    with pytest.raises(ValueError, match=r"artifact\.json"):
        try_making(store, lambda out: (out / "artifact.json").write_text("{}"))
    assert store.get(KEY) is None


def test_hard_linked_files_keep_their_mode_and_content(tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"w" * 100)
    source.chmod(0o400)
    store = Store(tmp_path / "s")
    try_making(store, lambda out: os.link(source, out / "weights"))
    assert source.stat().st_mode & 0o777 == 0o400
    assert store.gc().bytes < 1000
    assert source.read_bytes() == b"w" * 100


_CHILD = """
import sys, time
from pathlib import Path
from sdcompile.store import Store
parts = {"op": "onnx", "params": {"opset": 20}}
with Store(sys.argv[1]).making(sys.argv[2], parts, "unet.export.onnx", "r") as out:
    (out / "half").write_bytes(b"x" * 1000)
    print("in", flush=True)
    time.sleep(60)
"""


def killed_maker(root: Path) -> None:
    """A real process, killed with SIGKILL while it makes KEY."""
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(root), KEY], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "in\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


def test_kill_9_leaves_no_artifact_and_the_next_maker_sweeps(tmp_path: Path) -> None:
    killed_maker(tmp_path)
    store = Store(tmp_path)
    assert store.get(KEY) is None
    assert len(leftovers(store)) == 1
    make(store)
    assert leftovers(store) == []


def test_kill_9_leftovers_are_collected(tmp_path: Path) -> None:
    killed_maker(tmp_path)
    store = Store(tmp_path)
    assert store.usage().leftover_bytes == 1000
    freed = store.gc()
    assert (freed.bytes, freed.artifacts, freed.leftovers) == (1000, 0, 1)
    assert leftovers(store) == []
    assert list((tmp_path / "using").iterdir()) == []
    assert list((tmp_path / "locks").iterdir()) == []


def test_what_a_killed_step_saved_stays_until_it_is_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    state = store.unfinished(KEY)

    def half(out: Path) -> None:
        state.mkdir(parents=True)
        (state / "state").write_bytes(b"x" * 10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        try_making(store, half)
    assert leftovers(store) == []
    assert (state / "state").read_bytes() == b"x" * 10
    assert store.usage().leftover_bytes == 10
    make(store)
    assert not state.exists()


def test_gc_drops_what_unfinished_steps_saved_but_for_those_at_work_and_young_ones(tmp_path: Path) -> None:
    store = Store(tmp_path)
    state = store.unfinished(KEY)
    state.mkdir(parents=True)
    (state / "state").write_bytes(b"x" * 10)
    with store.using([KEY]):
        assert store.gc().leftovers == 0
    assert store.gc(older_than_s=60).leftovers == 0
    os.utime(state / "state", (0, 0))
    assert store.gc(older_than_s=60, dry_run=True).leftovers == 1
    freed = store.gc(older_than_s=60)
    assert (freed.bytes, freed.leftovers) == (10, 1)
    assert not state.exists()


def _race(root: str, log: str, barrier: Any, waited: Any) -> None:
    barrier.wait()
    with Store(root).making(KEY, PARTS, STEP, "r", waiting=lambda: waited.put(1)) as out:
        if out is not None:
            with Path(log).open("a") as file:
                file.write("made\n")
            time.sleep(0.3)
            (out / "x").write_text("x")


def test_four_processes_make_one_key_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, waited = context.Barrier(4), context.Queue()
    arguments = (str(tmp_path / "s"), str(tmp_path / "log"), barrier, waited)
    children = [context.Process(target=_race, args=arguments) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0, 0]
    assert (tmp_path / "log").read_text() == "made\n"
    assert waited.get(timeout=5) == 1
    assert Store(tmp_path / "s").get(KEY) is not None


# Damage


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda f: (f / "model.onnx").write_bytes(b"gra"), "model.onnx has 3 bytes where 5 were written"),
        (lambda f: (f / "sub/w.bin").unlink(), "sub/w.bin is missing"),
        (lambda f: (f / "artifact.json").unlink(), "artifact.json is missing"),
        (lambda f: (f / "artifact.json").write_text('{"format": 1'), "artifact.json cannot be read"),
        (lambda f: (f / "artifact.json").write_text("[]"), "artifact.json cannot be read"),
        (lambda f: (f / "artifact.json").write_text('{"format": 1, "key": "x"}'), "artifact.json cannot be read"),
        (lambda f: (f / "artifact.json").write_bytes(b"\xff"), "artifact.json cannot be read"),
    ],
)
def test_a_damaged_artifact_is_a_miss_with_a_reason_and_is_made_anew(tmp_path: Path, harm: Any, reason: str) -> None:
    store = Store(tmp_path)
    harm(make(store))
    assert store.get(KEY) is None
    assert store.damage(KEY).startswith(reason)
    made = make(store)
    assert (made / "model.onnx").read_bytes() == b"graph"
    assert store.damage(KEY) == ""
    assert leftovers(store) == []


def test_a_flipped_byte_is_found_by_check_and_taken_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = make(store)
    store.check(KEY)
    before = (made / "model.onnx").stat()
    (made / "model.onnx").write_bytes(b"gRaph")
    os.utime(made / "model.onnx", ns=(before.st_atime_ns, before.st_mtime_ns))
    for reader in (store, Store(tmp_path)):
        assert reader.get(KEY) == made
    with pytest.raises(StageError, match=r"unet\.export\.onnx is damaged .*: model\.onnx does not match") as caught:
        store.check(KEY)
    assert "run the same command again" in caught.value.hint
    assert Store(tmp_path).get(KEY) is None
    make(store)
    store.check(KEY)


def test_check_of_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="it is missing"):
        Store(tmp_path).check(KEY)


def test_check_reads_a_file_once_unless_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(Store(tmp_path))
    store, read = Store(tmp_path), []
    real = disk.sha256
    monkeypatch.setattr(disk, "sha256", lambda path: read.append(path.name) or real(path))
    store.check(KEY)
    store.check(KEY)
    assert read == ["model.onnx", "w.bin"]


# Disks that refuse


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(HostError, match=r"the store .*f is a file") as caught:
        Store(tmp_path / "f")
    assert "--store" in caught.value.hint
    assert "SDCOMPILE_STORE" in caught.value.hint


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "objects").write_text("x")
    with pytest.raises(HostError, match="objects is a file, where the store needs a folder"):
        make(Store(tmp_path))
    with pytest.raises(HostError, match="cannot write to the store"):
        make(Store(tmp_path / "objects" / "below"))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_an_unwritable_store_is_told_with_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(HostError, match=f"cannot write to the store {tmp_path / 's'}: {os.strerror(code)}") as caught:
        make(Store(tmp_path / "s"))
    assert "--store DIR or SDCOMPILE_STORE" in caught.value.hint


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc] . write: No space left on device"),
    ],
)
def test_a_full_disk_is_told_with_what_is_free_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    store = Store(tmp_path)
    with pytest.raises(HostError, match=r"no space left for the store .*: [\d.]+ GB free") as caught:
        try_making(store, raising(error))
    assert "sdcompile gc --store" in caught.value.hint
    assert store.get(KEY) is None
    assert leftovers(store) == []


def test_a_disk_that_fills_while_the_artifact_is_sealed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    store = Store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_through", full)
        with pytest.raises(HostError, match="no space left"):
            make(store)
    assert store.get(KEY) is None
    assert leftovers(store) == []
    make(store)


def test_an_ops_own_errors_are_not_the_stores(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    for error in (PermissionError(13, "denied", "/somewhere/else"), FileNotFoundError(2, "none"), RuntimeError("bug")):
        with pytest.raises(type(error)) as caught:
            try_making(store, raising(error))
        assert caught.value is error


# Explaining


def test_explain_names_each_field_that_changed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    upstream = {"op": "checkpoint"}
    make(store, upstream, "unet.fetch.checkpoint")
    old = {
        "op": "onnx",
        "params": {"opset": 20, "size": [64, 64], "text": "a b", "gone": 1, "same": None},
        "samplers": [{"name": "ddim"}],
        "inputs": {"checkpoint": key_of(upstream), "other": key_of({"x": 1})},
    }
    make(store, old)
    new = {
        "op": "onnx",
        "params": {"opset": 21, "size": [64, 128], "text": "", "same": None, "fresh": True},
        "samplers": [{"name": "euler"}, {"name": "ddim"}],
        "inputs": {"checkpoint": key_of({"op": "checkpoint", "v": 2}), "other": key_of({"x": 2})},
    }
    last = store.last("r", STEP)
    assert last == old
    fresh = new["inputs"]["checkpoint"]
    assert store.explain(last, new, {fresh: "unet.fetch.checkpoint"}) == [
        "params.opset: 20 -> 21",
        "params.size: [64, 64] -> [64, 128]",
        'params.text: a b -> ""',
        "params.gone: 1 -> (absent)",
        "params.fresh: (absent) -> true",
        "samplers.0.name: ddim -> euler",
        'samplers.1: (absent) -> {"name": "ddim"}',
        f"inputs.checkpoint: unet.fetch.checkpoint changed ({key_of(upstream)[:8]} -> {fresh[:8]})",
        f"inputs.other: its content changed ({key_of({'x': 1})[:8]} -> {key_of({'x': 2})[:8]})",
    ]
    # Without names, the old key's artifact still tells which step it was.
    assert "inputs.checkpoint: unet.fetch.checkpoint changed" in store.explain(last, new)[-2]
    assert store.explain(last, old) == []
    assert store.explain({"a": 1}, {"a": True}) == ["a: 1 -> true"]


def test_last_follows_what_was_made_or_used(tmp_path: Path) -> None:
    store = Store(tmp_path)
    make(store)
    make(store, {"op": "onnx", "params": {"opset": 21}})
    assert store.last_key("r", STEP) == key_of({"op": "onnx", "params": {"opset": 21}})
    store.remember("r", STEP, KEY)
    assert store.last("r", STEP) == PARTS
    assert store.last_key("r", STEP) == KEY
    assert store.last_key("r", "unet.other.x") is None
    assert store.last_keys() == {KEY}
    (tmp_path / "last" / "r" / f"{STEP}.json").write_text("{")
    assert store.last("r", STEP) is None


def test_names_that_would_leave_the_folder_are_refused(tmp_path: Path) -> None:
    for recipe, step in (("..", "x"), ("a/b", "x"), ("r", "../x"), ("", "x")):
        with pytest.raises(ValueError, match="no name"):
            Store(tmp_path).last(recipe, step)
    with pytest.raises(ValueError, match="no key"):
        Store(tmp_path).get("../x")


# Space


def test_gc_keeps_what_it_is_told_and_says_what_it_frees(tmp_path: Path) -> None:
    store = Store(tmp_path)
    make(store, files={"a": b"x" * 1000})
    other = {"op": "other"}
    make(store, other, files={"a": b"x" * 5000})
    would = store.gc([KEY], dry_run=True)
    assert would.artifacts == 1
    assert would.bytes > 5000
    assert store.get(key_of(other)) is not None
    assert store.gc([KEY]) == would
    assert store.get(KEY) is not None
    assert store.get(key_of(other)) is None
    assert store.usage().artifacts == 1


def test_gc_by_age_goes_by_last_use(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = make(store)
    os.utime(made / "artifact.json", (0, 0))
    other = make(store, {"op": "other"})
    os.utime(other / "artifact.json", (0, 0))
    store.remember("r", STEP, KEY)
    assert store.gc(older_than_s=3600).artifacts == 1
    assert store.get(KEY) is not None


def test_gc_leaves_what_a_running_build_uses(tmp_path: Path) -> None:
    store = Store(tmp_path)
    make(store)
    with store.using([KEY]):
        assert Store(tmp_path).gc().artifacts == 0
    assert store.get(KEY) is not None
    assert store.gc().artifacts == 1


def test_gc_leaves_what_is_being_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.making(KEY, PARTS, STEP, "r") as out:
        assert out is not None
        (out / "x").write_text("x")
        assert store.gc().leftovers == 0
        assert out.exists()
    assert store.get(KEY) is not None


def test_gc_touches_nothing_else_in_its_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    make(store)
    (tmp_path / "mine.sdc").mkdir()
    (tmp_path / "mine.sdc" / "manifest.json").write_text("{}")
    (tmp_path / ".gitkeep").touch()
    store.gc()
    assert (tmp_path / "mine.sdc" / "manifest.json").is_file()
    assert (tmp_path / ".gitkeep").is_file()


# Hashes


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"w" * (disk.LARGE_BYTES + 1))
    time.sleep(2 * disk.TICK_NS / 1e9)
    return path


def test_a_large_file_is_hashed_once(tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "s")
    first = store.hash_file(large)
    assert first == disk.sha256(large)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "sha256", lambda path: pytest.fail("read again"))
        assert Store(tmp_path / "s").hash_file(large) == first


def test_a_changed_file_is_hashed_again_even_with_the_old_time(tmp_path: Path, large: Path) -> None:
    store = Store(tmp_path / "s")
    first, before = store.hash_file(large), large.stat()
    with large.open("r+b") as file:
        file.write(b"X")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.hash_file(large) == disk.sha256(large) != first


def test_a_file_written_this_moment_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, path = Store(tmp_path / "s"), tmp_path / "w"
    path.write_bytes(b"w" * (disk.LARGE_BYTES + 1))
    monkeypatch.setattr(disk, "TICK_NS", 10**12)
    store.hash_file(path)
    assert not (tmp_path / "s" / "hashes").exists()


def test_a_damaged_or_unwritable_hash_cache_is_done_without(
    tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "s")
    store.hash_file(large)
    entry = next((tmp_path / "s" / "hashes").iterdir())
    for text in ("{", "[]", '{"signature": []}'):
        entry.write_text(text)
        assert store.hash_file(large) == disk.sha256(large)

    def refuse(path: Path, text: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    entry.unlink()
    monkeypatch.setattr(disk, "replace", refuse)
    assert store.hash_file(large) == disk.sha256(large)


def test_gc_forgets_hashes_of_files_that_are_gone(tmp_path: Path, large: Path) -> None:
    store = Store(tmp_path / "s")
    store.hash_file(large)
    store.gc()
    assert len(list((tmp_path / "s" / "hashes").iterdir())) == 1
    large.unlink()
    store.gc()
    assert list((tmp_path / "s" / "hashes").iterdir()) == []


def _hash(root: str, path: str, found: Any) -> None:
    found.put(Store(root).hash_file(Path(path)))


def test_four_processes_may_hash_one_file(tmp_path: Path, large: Path) -> None:
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    children = [context.Process(target=_hash, args=(str(tmp_path / "s"), str(large), found)) for _ in range(4)]
    for child in children:
        child.start()
    digests = {found.get(timeout=20) for _ in children}
    for child in children:
        child.join(20)
    assert digests == {disk.sha256(large)}
    entries = list((tmp_path / "s" / "hashes").iterdir())
    assert len(entries) == 1
    assert json.loads(entries[0].read_text())["sha256"] in digests
