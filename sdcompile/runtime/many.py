"""Many images over several processes, into a folder that says what is finished and goes on from there.

The same images come out whatever the number of processes: batches are laid out before they are
handed out, and every image has a seed of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdcompile import bundle as bundles
from sdcompile import machine
from sdcompile.errors import RecipeError
from sdcompile.families import FAMILIES
from sdcompile.runtime import load, workers
from sdcompile.runtime.choosing import choose
from sdcompile.runtime.options import Options
from sdcompile.runtime.promptfiles import Row
from sdcompile.runtime.saving import Progress, Saved, Wanted, grouped, images_of, make_folder, make_group, new_seed

INDEX = "index.jsonl"


@dataclass(frozen=True)
class Batch:
    """Images made by one call, and the number of the first among all."""

    first: int
    images: tuple[Wanted, ...]


def generate_many(
    bundle: Path, rows: Sequence[Row], output: Path, *, common: Options, count: int, threads: int | None = None,
    caches: Mapping[str, Any] = MappingProxyType({}), target: str | None = None, progress: Progress,
) -> list[Saved]:  # fmt: skip
    """Make the images of `rows` with `count` processes and write them below `output`, with an index.

    A second call with the same arguments makes only what is missing; without a seed it goes on with
    the first call's. Processor threads are shared out among the processes unless `threads` says how
    many each takes. `caches` are the arguments of `load` that say what is kept on disk.

    Raises RecipeError when `output` holds an index of another job, and what the pipeline raises.
    """
    manifest = bundles.read(bundle)
    # Every worker, and a later call that goes on, runs the target chosen here and now.
    target = choose(bundle, manifest, target, FAMILIES[manifest.family].required)[0].target or None
    make_folder(output)
    index = output / INDEX
    job = _job(bundle, rows, common, target)
    seed, finished = _resumed(index, job)
    first_seed = common.seed if common.seed is not None else seed if seed is not None else new_seed()
    wanted = images_of(rows, Options.of({**common.given(), "seed": first_seed}))
    batches, place = [], 0
    for group in grouped(wanted, max(1, manifest.ranges()["B"].max)):
        batches.append(Batch(place, tuple(group)))
        place += len(group)
    todo = [b for b in batches if not all(n in finished for n in range(b.first, b.first + len(b.images)))]
    progress(len(finished), 0, 0)
    share = threads or max(1, machine.threads() // count)
    with index.open("a", encoding="utf-8") as file:
        if not finished and seed is None:
            _write(file, {"job": job, "seed": first_seed, "images": len(wanted)})

        def done(number: int, saved: list[Saved]) -> None:
            for offset, image in enumerate(saved):
                finished[todo[number].first + offset] = image
                row = {**asdict(image), "path": image.path.name, "image": todo[number].first + offset}
                _write(file, row)
            progress(len(finished), 0, 0)

        setup = partial(_opened, bundle, output, share, dict(caches), target)
        workers.run(todo, min(count, max(1, len(todo))), setup, done)
    return [finished[number] for number in range(len(wanted))]


def _opened(
    bundle: Path, output: Path, threads: int, caches: dict[str, Any], target: str | None
) -> Callable[[Batch], list[Saved]]:
    """In a worker: the bundle opened, and the function that makes a batch with it."""
    pipeline = load(bundle, threads=threads, target=target, **caches)

    def make(batch: Batch) -> list[Saved]:
        return make_group(pipeline, batch.images, output, number=batch.first)

    return make


def _job(bundle: Path, rows: Sequence[Row], common: Options, target: str | None) -> str:
    """What decides the images, but for a seed that was not given: the sha256 of all of it."""
    told = [bundles.digest(bundle), common.given(), [[row.prompt, row.options.given()] for row in rows]]
    told += [target] if target else []
    return hashlib.sha256(json.dumps(told, default=str, sort_keys=True).encode()).hexdigest()


def _resumed(index: Path, job: str) -> tuple[int | None, dict[int, Saved]]:
    """The first seed and the finished images an index tells of; a last line cut short counts as not written."""
    if not index.exists():
        return None, {}
    rows: list[dict[str, Any]] = []
    text = index.read_text(encoding="utf-8")
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            index.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            break
    if not rows:
        return None, {}
    if rows[0].get("job") != job:
        raise RecipeError(
            f"{index} belongs to another job: another bundle, other prompts or other options",
            "choose another folder with --output, or give the arguments it was begun with",
        )
    finished = {
        row["image"]: Saved(index.parent / row["path"], row["prompt"], row["seed"], row["seconds"])
        for row in rows[1:]
        if (index.parent / row["path"]).is_file()
    }
    return int(rows[0]["seed"]), finished


def _write(file: Any, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()
