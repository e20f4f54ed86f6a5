"""How fast: seconds, memory and energy of bundles and peers, measured in turns.

Every contender runs in processes of its own. Within a round each makes one image of the same
prompt from the same noise, in an order that rotates, so that a slow moment of the machine hits
all alike; ratios are taken within rounds. Where memory does not hold all contenders at once, they
run one after the other, and the result says so.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sdcompile import __version__, bundle, machine, metrics
from sdcompile.errors import RecipeError
from sdcompile.measure import energy, figures
from sdcompile.measure.contenders import Ask, Contender, of_bundles, of_peer
from sdcompile.measure.peers import PEERS, REFERENCE
from sdcompile.measure.prompts import prompts_for
from sdcompile.measure.running import Running
from sdcompile.runtime import values
from sdcompile.spec import Say, say_nothing

FORMAT = 1
_GIB = 1 << 30
_PROMPTS = 64
_PARTS = ("text_encoder_s", "denoise_s", "call_s", "vae_s", "open_s")
_RATIOS = ("image_s", "cpu_s", "call_s")
"""Figures that contenders are compared by. `call_s`, which only bundles tell, is an image's mean call of the denoiser:
cached steps have long and short ones."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    processes  how often every contender is started anew (cold starts)
    images     timed images per process, after a first one that is kept apart
    batches    batch sizes whose throughput is measured besides one image at a time
    memory     how bundles are opened (see `runtime.load`)
    step_caches  values of step_cache with each of which every bundle is measured; () = its own default
    unet_widths  the same of widths
    alone      never hold two contenders at once, as where they share a GPU's memory
    """

    processes: int = 3
    images: int = 5
    threads: int = field(default_factory=machine.threads)
    batches: tuple[int, ...] = ()
    seed: int = 0
    prompt: str | None = None
    memory: str = "auto"
    step_caches: tuple[str, ...] = ()
    unet_widths: tuple[str, ...] = ()
    alone: bool = False


def step_caches(text: str) -> tuple[str, ...]:
    """ "off,3" -> ("off", "3"). Raises RecipeError for what is no value of step_cache."""
    found = words(text)
    for word in found:
        values.step_cache(word)
    return found


def words(text: str) -> tuple[str, ...]:
    """ "full, w75" -> ("full", "w75")."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def batch_sizes(text: str) -> tuple[int, ...]:
    """ "1,4" -> (1, 4); "" -> (). Raises RecipeError for anything but whole numbers from 1."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise RecipeError(f"--batch {text}: not a list of batch sizes", "as in --batch 1,4")
    return tuple(dict.fromkeys(int(word) for word in words))


@dataclass
class _Record:
    """What was measured of one contender."""

    what: str = ""
    values: dict[str, list[float]] = field(default_factory=dict)
    batches: dict[int, list[float]] = field(default_factory=dict)
    joules: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    anonymous_bytes: int = 0
    gpu_bytes: int | None = None
    export: dict[str, float] | None = None
    picture: np.ndarray | None = None

    def note(self, name: str, *values: float) -> None:
        self.values.setdefault(name, []).extend(values)


def bench(
    bundles: Sequence[Path],
    peers: Sequence[str] = (),
    *,
    model: Mapping[str, Path] = MappingProxyType({}),
    targets: Sequence[str] = (),
    ask: Ask | None = None,
    settings: Settings | None = None,
    say: Say = say_nothing,
) -> dict[str, Any]:
    """Measure `bundles`, and `peers` on the same `model` (see `sources.folders`), as the first bundle is asked.

    targets: of bundles of several, those to measure; () = the one that runs here.

    Returns plain JSON data: host, settings, and per contender its figures, memory, energy, ratio to
    the first one and agreement of the pictures. Raises RecipeError for what cannot be compared,
    HostError where a peer is not installed, StageError when a contender fails.
    """
    settings = settings or Settings()
    meter = energy.meter()
    with tempfile.TemporaryDirectory(prefix="sdcompile-bench-") as scratch:
        contenders = of_bundles(
            bundles, ask or Ask(), settings.threads, settings.memory, settings.step_caches, targets,
            settings.unet_widths,
        )  # fmt: skip
        contenders += [of_peer(name, contenders[0], model, Path(scratch)) for name in peers]
        prompts = [settings.prompt] if settings.prompt else _prompts(bundles[0], settings)
        records = {contender.name: _Record() for contender in contenders}
        _export_all(contenders, records, say)
        together = not settings.alone and _fits(contenders)
        turns = _Turns(records, prompts, settings, Path(scratch), meter, say)
        for process in range(settings.processes):
            for group in [contenders] if together else [[one] for one in contenders]:
                turns.take(group, process)
    base = records[contenders[0].name]
    reference = REFERENCE if REFERENCE in records else contenders[0].name
    return {
        "format": FORMAT,
        "kind": "bench",
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sdcompile": __version__,
        "host": host(),
        "settings": {
            **asdict(settings), "prompts": len(prompts),
            "alternated": "image by image" if together else "process by process",
        },
        "energy": meter.reason or f"counters {', '.join(meter.counters)}, idle share included",
        "base": contenders[0].name,
        "reference": reference,
        "contenders": [
            _row(contender, records[contender.name], base, records[reference], paired=together)
            for contender in contenders
        ],
    }  # fmt: skip


def host() -> dict[str, Any]:
    """The machine the figures were taken on, and how busy it was."""
    return {
        "cpu": machine.cpu_model(), "features": list(machine.cpu_features()), "threads": machine.threads(),
        "memory_bytes": machine.memory_bytes()[0], "system": platform.platform(terse=True),
        "python": platform.python_version(), "load_average": [round(load, 2) for load in os.getloadavg()],
    }  # fmt: skip


def _prompts(path: Path, settings: Settings) -> list[str]:
    return prompts_for(bundle.read(path), _PROMPTS, settings.seed)


def _export_all(contenders: Sequence[Contender], records: Mapping[str, _Record], say: Say) -> None:
    """Let each peer that runs on an export of its own make it, once per form."""
    for contender in contenders:
        target = contender.job.get("exported")
        if not target or Path(target).exists():
            continue
        say(f"{contender.name} exports", None)
        with Running(contender) as running:
            running.tell({**contender.job, "export": True})
            spent = time.perf_counter() - running.started
            records[contender.name].export = {"seconds": round(spent, 2), "peak_bytes": running.peak_bytes()}


def _fits(contenders: Sequence[Contender]) -> bool:
    """May all run at once? Twice its weights and a GiB each is what a contender is guessed to hold."""
    return sum(2 * contender.bytes + _GIB for contender in contenders) <= machine.memory_bytes()[1]


@dataclass
class _Turns:
    """Rounds of images: the same prompt and noise for every contender of a round."""

    records: Mapping[str, _Record]
    prompts: Sequence[str]
    settings: Settings
    folder: Path
    meter: energy.Meter
    say: Say
    done: int = 0

    def take(self, contenders: Sequence[Contender], process: int) -> None:
        """Start `contenders` one by one, each making its first image; then alternate."""
        with ExitStack() as stack:
            running = []
            for contender in _rotated(contenders, process):
                one = stack.enter_context(Running(contender))
                self._first(one, keep=process == 0)
                running.append(one)
            for number in range(1, 1 + self.settings.images):
                for one in _rotated(running, number):
                    self._timed(one, process * self.settings.images + number)
            if process == self.settings.processes - 1:
                for one in running:
                    self._batches(one)
            for one in running:
                record = self.records[one.contender.name]
                record.peak_bytes = max(record.peak_bytes, one.peak_bytes())
                record.anonymous_bytes = max(record.anonymous_bytes, one.anonymous_bytes)
                if one.gpu_bytes is not None:
                    record.gpu_bytes = max(record.gpu_bytes or 0, one.gpu_bytes)

    def _first(self, one: Running, *, keep: bool) -> None:
        record = self.records[one.contender.name]
        opened = one.open()
        record.what = opened["what"]
        record.note("load_s", opened["load_s"])
        path = self.folder / "picture.npy"
        told = self._image(one, 0, save=path if keep else None)
        record.note("cold_start_s", time.perf_counter() - one.started)
        record.note("first_image_s", told["image_s"])
        if keep:
            record.picture = np.load(path)

    def _timed(self, one: Running, number: int) -> None:
        record = self.records[one.contender.name]
        before = self.meter.read()
        told = self._image(one, number)
        if drawn := energy.joules(before, self.meter.read()):
            record.joules.append(sum(drawn.values()))
        record.note("image_s", told["image_s"])
        record.note("cpu_s", told["cpu_s"])
        record.note("step_s", *told["step_s"])
        for part in _PARTS:
            if part in told["parts"]:
                record.note(part, told["parts"][part])

    def _batches(self, one: Running) -> None:
        for size in self.settings.batches:
            self.say(f"{one.contender.name}, {size} at a time", None)
            one.tell(self._order(one, 0, size))  # compiles what the size needs
            seconds = [one.tell(self._order(one, number, size))["image_s"] for number in (1, 2)]
            self.records[one.contender.name].batches[size] = [size / spent for spent in seconds]

    def _image(self, one: Running, number: int, save: Path | None = None) -> dict[str, Any]:
        total = len(self.records) * self.settings.processes * (1 + self.settings.images)
        self.say(f"{one.contender.name}, image {number}", self.done / total)
        self.done += 1
        return one.tell(self._order(one, number, 1, save))

    def _order(self, one: Running, number: int, count: int, save: Path | None = None) -> dict[str, Any]:
        shape = one.contender.noise_shape(count)
        path = self.folder / f"noise-{number}-{'x'.join(map(str, shape))}.npy"
        if not path.exists():
            np.save(path, np.random.default_rng(self.settings.seed + number).standard_normal(shape, np.float32))
        prompt = self.prompts[number % len(self.prompts)]
        return {"prompt": prompt, "latents": str(path), "save": str(save) if save else None}


def _rotated(items: Sequence[Any], by: int) -> list[Any]:
    by %= len(items)
    return [*items[by:], *items[:by]]


def _row(contender: Contender, record: _Record, base: _Record, reference: _Record, *, paired: bool) -> dict[str, Any]:
    def ratio(name: str) -> dict[str, float]:
        mine, theirs = record.values[name], base.values[name]
        found = figures.paired_ratio(mine, theirs) if paired else figures.ratio_of_medians([mine], [theirs])
        return found.as_json()

    peer = PEERS.get(contender.kind)
    return {
        "name": contender.name,
        "kind": "peer" if peer else "bundle",
        "what": f"{peer.what} ({record.what})" if peer else record.what,
        "digest": contender.digest,
        "call": dict(contender.job["call"]),
        "sampler": contender.job["sampler"],
        "components": {name: dict(entry) for name, entry in contender.components.items()},
        "figures": {name: figures.summary(values) for name, values in record.values.items()},
        "images_per_s": {str(size): figures.summary(values) for size, values in record.batches.items()},
        "peak_bytes": record.peak_bytes,
        "anonymous_bytes": record.anonymous_bytes,
        "gpu_bytes": record.gpu_bytes,
        "energy_j": figures.summary(record.joules),
        "export": record.export,
        "ratio": {name: ratio(name) for name in _RATIOS if name in record.values and name in base.values},
        "psnr_db": _psnr_db(reference.picture, record.picture),
    }


def _psnr_db(reference: np.ndarray | None, picture: np.ndarray | None) -> float | None:
    """None where the pictures differ in size: there is nothing to compare."""
    if reference is None or picture is None or reference.shape != picture.shape:
        return None
    return round(metrics.psnr_db(reference, picture), 2)
