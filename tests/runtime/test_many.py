"""Queues over processes, resumable folders, and embeddings kept on disk."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sdcompile.errors import RecipeError, StageError
from sdcompile.runtime import load, workers
from sdcompile.runtime.diskcache import DiskCache
from sdcompile.runtime.many import INDEX, generate_many
from sdcompile.runtime.options import Options
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.runtime.promptcache import PromptCache
from sdcompile.runtime.promptfiles import Row
from tests.runtime.test_opening import folder
from tests.runtime.test_pipeline import Engines, model_in

bundle = folder
ROWS = [Row("red circle", Options(num_images_per_prompt=2)), Row("blue"), Row("green", Options(seed=77))]


def squares(marks: Path) -> Callable[[int], int]:
    """A worker's function of a task: the first time it meets 3 it dies, and it refuses 100."""

    def square(number: int) -> int:
        if number == 3 and not (marks / "died").exists():
            (marks / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 100:
            raise RecipeError("a hundred is too much")
        return number * number

    return square


def test_every_task_is_done_though_a_worker_dies(tmp_path: Path) -> None:
    found: dict[int, int] = {}
    workers.run([1, 2, 3, 5, 6], 2, partial(squares, tmp_path), found.__setitem__)
    assert found == {0: 1, 1: 4, 2: 9, 3: 25, 4: 36}
    assert (tmp_path / "died").exists()


def test_a_task_that_kills_every_worker_stops_the_queue(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="batch 1 ended its worker process 3 times"):
        workers.run([4], 1, partial(squares, tmp_path), lambda number, result: None)


def test_an_error_of_a_task_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a hundred"):
        workers.run([100, 1], 2, partial(squares, tmp_path), lambda number, result: None)


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.png")}


def test_the_same_images_come_out_whatever_the_number_of_processes(bundle: Path, tmp_path: Path) -> None:
    told: list[int] = []
    made = {}
    for count in (1, 2):
        output = tmp_path / str(count)
        saved = generate_many(
            bundle, ROWS, output, common=Options(seed=5), count=count, threads=1, progress=lambda n, *_: told.append(n)
        )
        assert [image.seed for image in saved] == [5, 6, 7, 77]
        made[count] = contents(output)
    assert made[1] == made[2]
    assert len(made[1]) == 4
    assert told[-1] == 4


def test_a_folder_goes_on_from_what_is_finished(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    again = partial(generate_many, bundle, ROWS, output, count=1, threads=1, progress=lambda *_: None)
    first = again(common=Options())
    before = contents(output)
    (output / first[2].path.name).unlink()
    index = output / INDEX
    index.write_text(index.read_text(encoding="utf-8") + '{"image": 3, "pa', encoding="utf-8")
    stamp = first[0].path.stat().st_mtime_ns
    assert [image.path for image in again(common=Options())] == [image.path for image in first]
    assert contents(output) == before
    assert first[0].path.stat().st_mtime_ns == stamp
    assert all(json.loads(line) for line in index.read_text(encoding="utf-8").splitlines())
    with pytest.raises(RecipeError, match="belongs to another job"):
        again(common=Options(guidance_scale=2.0))


def test_embeddings_are_shared_by_pipelines_and_damage_is_computed_anew(tmp_path: Path) -> None:
    model = model_in(tmp_path)
    cache = tmp_path / "prompts"
    expected = Pipeline(model, Engines()).embedder(["red", "blue"])["encoder_hidden_states"]

    def counted() -> tuple[int, int]:
        engines = Engines()
        pipe = Pipeline(model, engines)
        pipe.keep_prompts(cache, 1 << 20)
        assert np.array_equal(pipe.embedder(["red", "blue"])["encoder_hidden_states"], expected)
        return pipe.embedder.counts.read, pipe.embedder.counts.computed

    assert [counted(), counted()] == [(0, 2), (2, 0)]
    for damage in (b"", b"junk", next(cache.glob("*.npz")).read_bytes()[:-9]):
        next(cache.glob("*.npz")).write_bytes(damage)
        assert [counted(), counted()] == [(1, 1), (2, 0)]


def test_the_cache_keeps_what_was_used_last_and_tells_encoders_apart(tmp_path: Path) -> None:
    row = {"states": np.ones((6, 5), np.float32)}
    cache = PromptCache(DiskCache(tmp_path, 3000), "one")
    for number in range(9):
        cache.put(f"prompt {number}", "off", row)
        for path in tmp_path.glob("*.npz"):
            os.utime(path, ns=(path.stat().st_mtime_ns - 10**9,) * 2)
        assert cache.get("prompt 0", "off") is not None
    assert cache.get("prompt 1", "off") is None
    assert cache.get("prompt 8", "off") is not None
    assert cache.get("prompt 0", "a1111") is None
    assert PromptCache(DiskCache(tmp_path, 3000), "other").get("prompt 0", "off") is None
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3000


def test_warming_up_opens_every_engine_and_changes_no_picture(bundle: Path) -> None:
    with load(bundle) as cold, load(bundle, memory="high") as warm:
        assert warm.warm_up() > 0
        made = warm("?", seed=1, output_type="np")
        assert made.timings["open_s"] == 0
        assert np.array_equal(made.images, cold("?", seed=1, output_type="np").images)


def test_many_images_are_taken_from_those_that_are_kept(bundle: Path, tmp_path: Path) -> None:
    caches = {"image_cache": tmp_path / "kept"}
    made = {}
    for name in ("first", "second"):
        saved = generate_many(
            bundle, ROWS, tmp_path / name, common=Options(seed=5), count=1, threads=1, caches=caches,
            progress=lambda *_: None,
        )  # fmt: skip
        made[name] = contents(tmp_path / name)
    assert made["first"] == made["second"]
    assert [image.seconds for image in saved] == [0] * 4, "nothing was computed the second time"
