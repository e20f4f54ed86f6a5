"""The one loop: take a step's folder from the store, or make it.

Knows how steps follow each other, what a damaged artifact or a missed floor means for a build,
and nothing of what any step does.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile import isolated, machine, sources
from sdcompile.backends import BACKENDS
from sdcompile.errors import HostError, SdcompileError, StageError, VerifyError
from sdcompile.families import FAMILIES
from sdcompile.files import link_tree
from sdcompile.passes import PASSES
from sdcompile.plan import SOURCE, Machine, Plan, Step, races, resolve
from sdcompile.plan.races import Detour
from sdcompile.recipe import Recipe, load
from sdcompile.recipe.changes import in_precision, with_float
from sdcompile.spec import PIPELINE, Job, Say, Stage, at_target, say_nothing
from sdcompile.steps import OPS
from sdcompile.steps.report import broken, fault

if TYPE_CHECKING:
    from sdcompile.console import Observer
    from sdcompile.steps.layout import Source
    from sdcompile.store import Store


_JUDGED = ("report", "race")
"""Forms that say whether the build may go on."""

ISOLATE_BYTES = 1 << 30
"""Steps that need more memory than this run in a process of their own. Starting one costs
some seconds of imports, which only a large model repays."""


@dataclass
class Build:
    """A recipe on its way to a bundle: everything a command needs to plan, make or explain it.

    fallbacks   component (of a target: unet@openvino) -> why it is not built as asked, all its `notes` in one
    notes       the same, told apart by what they are about: "prune" or "precision"
    won         component -> the recipe in which all of it won the race of int8, before groups were left in float
    """

    recipe: Recipe
    source: Source
    store: Store
    plan: Plan
    fallbacks: dict[str, str] = field(default_factory=dict)
    notes: dict[str, dict[str, str]] = field(default_factory=dict)
    won: dict[str, Recipe] = field(default_factory=dict)


def this_machine() -> Machine:
    """The facts of this machine that plans depend on; reads metadata only."""
    packages = {name for row in OPS.values() for name in row.packages}
    packages |= {name for backend in BACKENDS.values() for name in backend.packages}
    packages |= {name for record in PASSES.values() for name in record.packages}
    return Machine(
        versions={name: machine.version(name) for name in sorted(packages)},
        probes={name: backend.probe() for name, backend in BACKENDS.items()},
        identity=machine.identity(),
    )


def prepare(path: Path, sets: tuple[str, ...], store: Store, *, offline: bool) -> Build:
    """Read the recipe, describe its source and lay out the whole plan."""
    recipe = load(path, sets)
    return lay_out(recipe, recipe.base(), store, offline=offline)


def lay_out(recipe: Recipe, base: Path, store: Store, *, offline: bool) -> Build:
    """Describe the source of `recipe`, whose relative paths start at `base`, and plan every step."""
    source = sources.describe(recipe, base, offline=offline, hash_file=store.hash_file)
    return Build(recipe, source, store, resolve(recipe, source, this_machine()))


def wanted(plan: Plan, store: Store) -> dict[str, bool]:
    """Step name -> must it be made? Steps that nothing missing depends on are left out.

    A hit needs none of its inputs, so a bundle whose intermediates were collected stays built.
    """
    consumed = {name for step in plan for name in step.inputs.values()}
    found: dict[str, bool] = {}
    todo = [step.name for step in plan if step.name not in consumed or step.gives in _JUDGED]
    todo += plan.goals
    while todo:
        name = todo.pop()
        if name in found or name == SOURCE:
            continue
        found[name] = store.get(plan[name].key) is None
        if found[name]:
            todo.extend(plan[name].inputs.values())
    return found


def check_fit(plan: Plan, store: Store) -> None:
    """Raise HostError when a step still to be made needs more memory or disk than there is."""
    missing = [step for step in plan if wanted(plan, store).get(step.name)]
    obstacles = [f"{step.name}: {step.cannot}" for step in missing if step.cannot]
    if obstacles:
        targets = dict.fromkeys(step.target for step in missing if step.cannot and step.target)
        way_out = f", or build without {', '.join(targets)}: take it out of `targets`" if targets else ""
        if all(step.gives == "race" for step in missing if step.cannot):
            way_out = ", or leave out `accept_if`, which races engines on the machine that builds them"
        raise HostError("\n".join(obstacles), f"`sdcompile doctor` lists what this machine has{way_out}")
    _, available = machine.memory_bytes()
    largest = max(missing, key=lambda step: step.memory_bytes, default=None)
    if largest and largest.memory_bytes > available:
        raise HostError(
            f"{largest.name} needs about {largest.memory_bytes / 2**30:.1f} GiB of memory; "
            f"{available / 2**30:.1f} GiB are available",
            "close other programs, build on a larger machine, or try all the same with --force",
        )
    need, free = sum(step.disk_bytes for step in missing), machine.free_disk_bytes(store.root)
    if need > free:
        raise HostError(
            f"this build writes about {need / 2**30:.1f} GiB; "
            f"{free / 2**30:.1f} GiB are free on the disk of {store.root}",
            "free space with `sdcompile gc`, choose another --store, or try all the same with --force",
        )


def build(
    work: Build, stage: Stage, observer: Observer, *, only: str | None = None, force: bool = False
) -> dict[str, Path]:
    """Make everything `stage` needs; returns step name -> folder of what was needed.

    Raises VerifyError when an engine misses its floor, unless the recipe says `on_fail: fallback` (or `on_nan:
    fallback`, where it overflows or gives NaN or one colour): then the component is rebuilt in fp32. One that loses
    the race of `accept_if` is rebuilt without the groups of layers that lose it, unquantized or unpruned. The
    manifest says so.
    """
    while True:
        plan = work.plan.until(stage, only)
        if not force:
            check_fit(plan, work.store)
        try:
            with work.store.using([step.key for step in plan]):
                return _make_all(work, plan, observer)
        except _Missed as missed:
            name = _fallback_component(work, missed)
            if name is None:
                raise missed.error from None
            asked = work.recipe.by_target()[missed.target].effective(name).precision
            why = missed.broken or missed.error.message.splitlines()[0]
            note = f"asked for {asked}, built in fp32 because verification failed: {why}"
            changed = in_precision(work.recipe, name, "fp32", missed.target)
            _take(work, Detour(changed, at_target(name, missed.target), "precision", note), observer)
        except _Slower as slower:
            if slower.race["won"]:
                name = at_target(slower.race["component"], slower.target)
                work.won[name] = with_float(work.recipe, slower.race["component"], (), slower.target)
            _take(work, races.with_slower_in_float(work.recipe, slower.race, slower.target), observer)
        except _Lost as lost:
            won = work.won.pop(at_target(lost.race["component"], lost.target), None)
            _take(work, races.without_loser(work.recipe, lost.race, lost.target, won), observer)


def _take(work: Build, detour: Detour, observer: Observer) -> None:
    """Plan again with a changed recipe; the manifest will hold its note, in the place of an earlier one on the same."""
    observer.warn(f"{detour.name}: {detour.note}")
    notes = work.notes.setdefault(detour.name, {})
    notes[detour.about] = detour.note
    work.fallbacks[detour.name] = "; ".join(notes.values())
    work.recipe = detour.recipe
    work.plan = resolve(work.recipe, work.source, this_machine(), work.fallbacks)


class _Lost(Exception):  # noqa: N818 - a turn of the loop, not an error a user meets
    """A quantized or pruned engine was not fast enough to be kept."""

    def __init__(self, race: Mapping[str, Any], target: str = "") -> None:
        super().__init__(race["component"])
        self.race, self.target = race, target


class _Slower(_Lost):
    """Groups of layers in a quantized engine take longer than they would unquantized."""


class _Missed(Exception):  # noqa: N818 - a turn of the loop, not an error a user meets
    """A report says its floor was missed."""

    def __init__(self, step: Step, error: VerifyError, report: Mapping[str, Any]) -> None:
        super().__init__(step.of)
        self.component, self.target, self.error, self.report = step.component, step.target, error, report
        self.broken = broken(report)


def _fallback_component(work: Build, missed: _Missed) -> str | None:
    """Which component to rebuild in fp32: the failing one, or for images the one to blame or the coarsest one left."""
    verify = work.recipe.verify
    if ((missed.broken and verify.on_nan) or verify.on_fail) != "fallback":
        return None
    if not missed.report.get("own_decoder", {}).get("passed", True):
        return None  # no precision makes another decoder the right one
    if not (missed.report.get("whole") or {"passed": True})["passed"]:
        return None  # nor rows that depend on each other, which they do in fp32
    family = FAMILIES[work.recipe.family]
    candidates = [missed.component]
    if missed.component == PIPELINE:
        if missed.report["worst"]["passed"]:
            return None  # what step caching costs, it costs in every precision
        candidates = [family.denoiser, *family.required]
    if missed.report.get("blame"):
        candidates = [missed.report["blame"]]
    recipe = work.recipe.by_target()[missed.target]
    for name in candidates:
        chosen = recipe.effective(name)
        if chosen.precision != "fp32" and "fp32" in BACKENDS[chosen.backend].realises:
            return name
    return None


def _make_all(work: Build, plan: Plan, observer: Observer) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for step in plan:
        # A race that is known to be lost needs no engine again.
        if step.gives == "race" and (known := work.store.get(step.key)) is not None:
            _judge(work, step, known)
    needed = wanted(plan, work.store)
    for step in plan:
        if step.name not in needed:
            continue
        made = work.store.get(step.key)
        if made is not None:
            observer.step_hit(step)
            work.store.remember(work.recipe.name, step.name, step.key)
        else:
            made = _make(work, step, paths, observer)
        paths[step.name] = made
        if step.gives in _JUDGED:
            _judge(work, step, made)
    return paths


def _judge(work: Build, step: Step, folder: Path) -> None:
    """`_gate`, and remember a race that was lost under a name of its own: the plan that follows has another one in its
    place, and gc keeps what is remembered."""
    try:
        _gate(step, folder)
    except _Lost as lost:
        how = "slower" if isinstance(lost, _Slower) else "lost"
        work.store.remember(work.recipe.name, f"{step.name}-{how}", step.key)
        raise


def _gate(step: Step, folder: Path) -> None:
    """Stop where a floor was missed or a race was lost, whether that was found now or before."""
    # Which width of a denoiser it is, only the plan knows: engines are the same whatever they are called.
    if step.gives == "race":
        race = json.loads((folder / "race.json").read_text(encoding="utf-8")) | {"component": step.component}
        if race["slower"]:
            raise _Slower(race, step.target)
        if not race["won"]:
            raise _Lost(race, step.target)
        return
    report = json.loads((folder / "report.json").read_text(encoding="utf-8")) | {"component": step.component}
    if not report["passed"]:
        raise _Missed(step, fault(report, folder, step.target), report)


def _make(work: Build, step: Step, paths: Mapping[str, Path], observer: Observer) -> Path:
    observer.step_start(step)
    started = time.monotonic()
    notes: dict[str, Any] = {}
    machine.reset_peak()
    try:
        with work.store.making(
            step.key, step.parts, step.name, work.recipe.name, notes=notes,
            waiting=lambda: observer.step_say(step, "waiting for another build of this step", None),
        ) as out:  # fmt: skip
            if out is not None:
                cache = work.store.root / "caches"
                inputs = {role: _input(work, step, name, paths) for role, name in step.inputs.items()}
                job = replace(step.job, say=say_nothing, cache=cache, state=work.store.unfinished(step.key))
                work_of = partial(_perform, step.op, inputs, out, job)
                say: Say = partial(observer.step_say, step)
                if step.memory_bytes > ISOLATE_BYTES:
                    notes["peak_bytes"] = isolated.run(work_of, say, step.name)
                else:
                    work_of(say)
                    notes["peak_bytes"] = machine.peak_bytes()
                notes["seconds"] = round(time.monotonic() - started, 3)
    except SdcompileError as error:
        observer.step_failed(step, error)
        raise
    except (MemoryError, OSError) as error:
        observer.step_failed(step, error)
        raise StageError(
            f"{step.name} could not finish: {error}", "finished steps are kept; run the same command to go on"
        ) from error
    finally:
        machine.release_memory()
    made = work.store.get(step.key)
    assert made is not None, f"{step.name} left no artifact"
    observer.step_done(step, time.monotonic() - started, notes.get("peak_bytes", 0))
    return made


def _input(work: Build, step: Step, name: str, paths: Mapping[str, Path]) -> Path:
    """The folder of an input, its hashes checked first: a damaged artifact must not be built upon."""
    if name == SOURCE:
        folders = step.job.params["folder"]
        return work.source.locate((folders,) if isinstance(folders, str) else tuple(folders), step.job.say)
    work.store.check(work.plan[name].key)
    return paths[name]


def _perform(op: str, inputs: Mapping[str, Path], out: Path, job: Job, say: Say) -> None:
    """Call the op, pass or backend build named `op`; picklable, so that another process can."""
    job = replace(job, say=say)
    if op in BACKENDS:
        BACKENDS[op].build(inputs[BACKENDS[op].takes], out, job)
    elif op in PASSES:
        PASSES[op].run(inputs, out, job)
    else:
        getattr(import_module(OPS[op].module), OPS[op].function)(inputs, out, job)


def place(work: Build, folder: Path, output: Path) -> Path:
    """Put the finished bundle at `output/<name>.sdc`, replacing an older one by renames.

    Raises StageError when the bundle in the store is damaged, HostError when `output` cannot be written.
    """
    from sdcompile import bundle

    work.store.check(work.plan["pipeline.package.bundle"].key)
    name = work.recipe.name
    target = output / f"{name}{bundle.SUFFIX}"
    try:
        if _is_same(folder, target):
            return target
        output.mkdir(parents=True, exist_ok=True)
        fresh, old = output / f".{name}.new", output / f".{name}.old"
        for stale in (fresh, old):
            shutil.rmtree(stale, ignore_errors=True)
        link_tree(folder, fresh)
        (fresh / "artifact.json").unlink(missing_ok=True)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise HostError(
            f"cannot write the bundle to {target}: {error.strerror}", "choose another folder with --output"
        ) from error
    return target


def _is_same(folder: Path, target: Path) -> bool:
    """Is `target` the finished bundle `folder` already, whole by its files' sizes?"""
    from sdcompile import bundle

    if not (target / "manifest.json").is_file() or bundle.digest(target) != bundle.digest(folder):
        return False
    entries = bundle.read(folder).files.items()
    return all((target / path).is_file() and (target / path).stat().st_size == e.bytes for path, e in entries)
