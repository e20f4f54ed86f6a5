"""The words every backend shares: its record, its engine, and the card an engine folder carries.

Standard library only. It knows no engine library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sdcompile.errors import StageError
from sdcompile.spec import ComponentSpec, Job, Kind, Precision, Range, Shapes, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from pydantic import BaseModel


class Engine(Protocol):
    """A component that runs: arrays in, arrays out.

    `facts` tells what really runs ({"device": "CPU", "precision": "fp32", ...}), which may
    differ from what was asked. Feeds are never changed, and those that stay the same from call to
    call may be read-only; outputs belong to the caller. An engine that can keep arrays on its device from call to
    call has `arrays` as well, a `Device`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


class Arrays(Protocol):
    """What sampling does to float32 arrays (N, C, h, w) between two calls of the denoiser, wherever they are kept.

    Products and sums are rounded as numpy rounds them, so that latents do not depend on the place.

    known       is every result there when a method returns? Else it comes in order, and `get` and `wait` wait for it
    put, get    an array from the host; one for the host, which belongs to the caller
    scaled      array * factor, in float64
    weighted    the sum of array * value, in float64 and in the order given
    counters    so many counters, all 0; `count_bad` adds to one of them how many values of an array are NaN or infinite
    counted     counters, for the host
    """

    @property
    def known(self) -> bool: ...

    def put(self, array: np.ndarray) -> Any: ...
    def get(self, array: Any) -> np.ndarray: ...
    def scaled(self, array: Any, factor: float) -> Any: ...
    def weighted(self, terms: Sequence[tuple[Any, float]]) -> Any: ...
    def counters(self, count: int) -> Any: ...
    def count_bad(self, array: Any, counters: Any, place: int) -> None: ...
    def counted(self, counters: Any) -> np.ndarray: ...
    def wait(self) -> None: ...


class Device(Arrays, Protocol):
    """Arrays on the device of one engine, which take their turn with its calls.

    They have `shape` and can be sliced by rows. One thread at a time.

    most_terms  how many terms `weighted` takes
    begin       marks begin anew; called before anything else of a run
    run         the engine, fed with arrays of the device and of the host; its outputs stay on the device
    guided      negative + scale * (positive - negative), in float32
    joined      the rows of several arrays, one after another
    mark, laps  moments in the order of the work; the seconds between each and the next, once the work is done
    """

    @property
    def most_terms(self) -> int: ...

    def begin(self) -> None: ...
    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]: ...
    def guided(self, negative: Any, positive: Any, scale: float) -> Any: ...
    def joined(self, arrays: Sequence[Any]) -> Any: ...
    def mark(self) -> None: ...
    def laps(self) -> list[float]: ...


@dataclass(frozen=True)
class Host:
    """How a host wants engines opened: worker threads (None = the library's choice) and a folder for
    compiled-model caches (None = do not cache, or where the user's caches are: the backend's choice)."""

    threads: int | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class Probe:
    """What a look at this machine found: is the backend usable, which version, on what devices,
    or why not and what to type.

    cannot_run  why engines, though they can be built, cannot run here ("" = they can)
    identity    what of a device decides bytes or figures; part of the key of what is made on it
    providers   where a backend runs on one of several kinds of device: kind -> its `identity`
    missing     kind of device that cannot be used here -> why
    """

    available: bool
    version: str | None = None
    devices: tuple[str, ...] = ()
    reason: str = ""
    hint: str = ""
    notes: tuple[str, ...] = ()
    cannot_run: str = ""
    identity: Mapping[str, str] = field(default_factory=dict)
    providers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


def _takes_all(precision: Precision, options: BaseModel) -> list[str]:
    return []


def _as_exported(options: BaseModel) -> Mapping[str, Any]:
    return {}


def _lacks_nothing(found: Probe, precision: Precision, options: BaseModel) -> str:
    return ""


def _no_device(found: Probe, options: BaseModel) -> Mapping[str, str]:
    return {}


def _fits_all(folder: Path) -> str:
    return ""


@dataclass(frozen=True)
class Backend:
    """One way to build and run components.

    takes      the form `build` reads: "checkpoint" or "onnx"
    realises   precision -> names of the passes that put it in the graph; () = the build does it
    options    pydantic model of the recipe's `build:` mapping for this backend
    export     options -> what this backend asks of the ONNX exporter (e.g. {"attention": "mha"})
    quantize   params this backend asks of the quantization pass, unless the recipe sets them
    modes      mode of the quantization pass -> bits of weights that this backend has kernels for
    rests      precisions that what int8 leaves unquantized may have, the usual one first; what a recipe chose
               (`quantize: {rest: ...}`) is job.params["rest"] of an int8 build
    packages   distributions whose versions decide the bytes `build` writes (part of the key)
    probe      () -> Probe, from metadata only
    build      (src, out, job): read the form in `src`, write the engine's files into `out`
    open       (dir, host): the engine in `dir`, ready to run
    host_bound True when the bytes `build` writes also depend on this machine's processor and device
    profile    (dir, feeds, calls) -> what one call spends where: (names of the operators that one kernel computes,
               the least seconds over the calls), in the order they run; None = such engines do not tell
    device     (what `probe` found, options) -> what, of a device that these options alone ask for, decides bytes and
               figures (part of the key)
    memory     peak resident memory of `build`: (times the component's fp32 bytes, plus GiB)
    verifiable False for engines that compute nothing a reference could be compared with
    refuses    (precision, options) -> why such an engine can be built nowhere, one line each
    lacks      (what `probe` found, precision, options) -> why this machine, though the backend is here, cannot
               build such an engine ("" = it can)
    fits       dir -> which of the engines in it this machine runs ("" where there is one for all), nothing
               loaded; raises HostError, also where the backend is not available at all
    """

    name: str
    takes: Kind
    realises: Mapping[Precision, tuple[str, ...]]
    options: type[BaseModel]
    probe: Callable[[], Probe]
    build: Callable[[Path, Path, Job], None]
    open: Callable[[Path, Host], Engine]
    packages: tuple[str, ...] = ()
    revision: int = 1
    export: Callable[[BaseModel], Mapping[str, Any]] = _as_exported
    quantize: Mapping[str, Any] = field(default_factory=dict)
    modes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"static": (8,), "weights": (8,)})
    rests: tuple[Precision, ...] = ("fp32",)
    host_bound: bool = False
    memory: tuple[float, float] = (1.2, 0.6)
    verifiable: bool = True
    refuses: Callable[[Precision, BaseModel], list[str]] = _takes_all
    lacks: Callable[[Probe, Precision, BaseModel], str] = _lacks_nothing
    fits: Callable[[Path], str] = _fits_all
    device: Callable[[Probe, BaseModel], Mapping[str, str]] = _no_device
    profile: Callable[[Path, Mapping[str, np.ndarray], int], list[tuple[str, float]]] | None = None


def rebuilding(component: str, backend: str) -> str:
    """What to type so that a recipe's `component` is built by another `backend`.

    Options of a build are each backend's own, and a component may have its own backend: both are unset.
    """
    own = f"components.{component}"
    return f"sdcompile build RECIPE --set backend={backend} --set build= --set {own}.backend= --set {own}.build="


def is_constant(array: np.ndarray) -> bool:
    """Can nobody write to this array? A read-only view of a writable one would not do."""
    return array.flags.owndata and not array.flags.writeable


CARD = "engine.json"
LAYERS = "layers.json"
"""Where an engine folder keeps its compiler's own layer table and what was claimed of it, if the compiler gives one:
{"promise": {...}, "engines": {target: {"claims": [...], "summary": {...}, "io": [...], "layers": [...]}}}."""


@dataclass(frozen=True)
class Card:
    """What an engine folder says of itself in engine.json: all that `open` needs besides the engine's files.

    params     what the build was told (job.params)
    measured   what the build found out on this machine and decided (timings, choices)
    """

    backend: str
    component: str
    precision: Precision
    spec: ComponentSpec
    shapes: Shapes
    params: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> Mapping[str, Any]:
        return self.params.get("options") or {}


def card_from_job(backend: str, job: Job, measured: Mapping[str, Any] | None = None) -> Card:
    if job.spec is None:
        raise ValueError(f"{backend}: a build needs job.spec")
    return Card(backend, job.component, job.precision, job.spec, job.shapes, job.params, measured or {})


def write_card(folder: Path, card: Card) -> None:
    data = {
        "backend": card.backend,
        "component": card.component,
        "precision": card.precision,
        "spec": card.spec.as_json(),
        "shapes": {letter: list(bounds) for letter, bounds in card.shapes.items()},
        "params": dict(card.params),
        "measured": dict(card.measured),
    }
    (folder / CARD).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_card(folder: Path, backend: str) -> Card:
    """The card of the engine in `folder`. Raises StageError when it is missing, damaged or another backend's."""
    path = folder / CARD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        card = Card(
            backend=data["backend"],
            component=data["component"],
            precision=data["precision"],
            spec=ComponentSpec.from_json(data["component"], data["spec"]),
            shapes={letter: Range(*bounds) for letter, bounds in data["shapes"].items()},
            params=data["params"],
            measured=data["measured"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"{folder} holds no whole engine: {CARD}: {error}", "build it again") from error
    if card.backend != backend:
        raise StageError(f"{folder} holds an engine of backend {card.backend}, not of {backend}")
    return card
