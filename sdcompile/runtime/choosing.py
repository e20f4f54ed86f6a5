"""Which of a bundle's targets this machine runs, and what keeps it from running the others.

Asks the backends and reads engines' cards; nothing is loaded. No file of a target that is not chosen is
checked or opened beyond its cards.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from sdcompile.backends import BACKENDS, Probe
from sdcompile.backends.base import rebuilding
from sdcompile.bundle import Manifest
from sdcompile.errors import BundleError, HostError, RecipeError, SdcompileError, StageError
from sdcompile.families import FAMILIES

_DEVELOPMENT = ("stub", "reference")  # backends nobody deploys on


class Fit(NamedTuple):
    """Can this machine run one component? `engine`: which of those built ("" where there is one for all)."""

    component: str
    engine: str = ""
    fault: SdcompileError | None = None


class Verdict(NamedTuple):
    """Can this machine run one target? "" is the target of a bundle that has one."""

    target: str
    fits: tuple[Fit, ...]

    @property
    def fault(self) -> SdcompileError | None:
        """What keeps its first component that cannot run from running."""
        return next((fit.fault for fit in self.fits if fit.fault is not None), None)


def judge(folder: Path, manifest: Manifest, components: Iterable[str] | None = None) -> Verdict:
    """The verdict on the one target that `manifest` is of; None = all of its components."""
    rows = []
    for name in manifest.components if components is None else components:
        try:
            rows.append(Fit(name, fitting(folder, manifest, name)))
        except (HostError, BundleError) as error:
            rows.append(Fit(name, fault=error))
    return Verdict(manifest.target, tuple(rows))


def choose(folder: Path, manifest: Manifest, target: str | None, components: Iterable[str]) -> tuple[Manifest, str]:
    """The manifest of the target to run, and why it: the one asked for, else the first that this machine runs.

    The reason is "" where there is nothing to choose. Raises HostError, naming for every target what keeps it
    from running and what to do, RecipeError when `target` is none of them, BundleError where the files of the
    first that could run are damaged.
    """
    needed = tuple(components)
    if target is not None or not manifest.targets:
        one = named(folder, manifest, target)
        _require(folder, manifest, judge(folder, one, needed))
        return one, f"{target}, as asked" if target else ""
    passed: list[Verdict] = []
    for one in manifest.by_target().values():
        verdict = judge(folder, one, needed)
        if verdict.fault is None:
            return one, _reason(folder, one.target, passed)
        if isinstance(verdict.fault, BundleError) and all(e.backend in BACKENDS for e in one.components.values()):
            raise verdict.fault  # it could run here were it whole: the next one would only hide that
        passed.append(verdict)
    raise nothing_runs(folder, manifest, passed)


def named(folder: Path, manifest: Manifest, target: str | None) -> Manifest:
    """The manifest of the target called `target`; the bundle's own where it has one target and none is named.

    Raises RecipeError when there is no such target.
    """
    if not manifest.targets:
        if target is None:
            return manifest
        raise RecipeError(f"{folder} has one target, so none can be chosen by name", "leave the target out")
    if target not in manifest.targets:
        raise RecipeError(f"{folder} has no target {target}", f"it has: {', '.join(manifest.targets)}")
    return manifest.of_target(target)


def runnable(folder: Path, manifest: Manifest, target: str | None) -> tuple[list[Manifest], list[Verdict]]:
    """(the manifests of `target`, or of every target that this machine runs; verdicts on those it does not run).

    Raises HostError when that leaves none, RecipeError when `target` is none of them.
    """
    wanted = [named(folder, manifest, target)] if target or not manifest.targets else manifest.by_target().values()
    found = [(one, judge(folder, one)) for one in wanted]
    unfit = [verdict for _, verdict in found if verdict.fault is not None]
    if len(unfit) == len(found):
        if len(found) == 1:
            _require(folder, manifest, unfit[0])
        raise nothing_runs(folder, manifest, unfit)
    return [one for one, verdict in found if verdict.fault is None], unfit


def fitting(folder: Path, manifest: Manifest, name: str) -> str:
    """Which of the engines built for component `name` this machine runs ("" where there is one for all).

    Nothing is loaded. Raises HostError, naming reason and remedy; BundleError for a backend unknown here, and
    for a damaged engine that could run here.
    """
    backend = manifest.components[name].backend
    if backend not in BACKENDS:
        raise BundleError(
            f"{folder}: {name} was compiled by backend {backend!r}, which this sdcompile does not have",
            "upgrade sdcompile",
        )
    probe = BACKENDS[backend].probe()
    try:
        fit = BACKENDS[backend].fits(folder / manifest.folder_of(name))
        if probe.available:
            return fit
    except StageError as error:
        if probe.available and not probe.cannot_run:
            raise BundleError(error.message, "copy the bundle again, or rebuild it") from error
        if probe.cannot_run:
            raise HostError(f"{name} ({backend}) cannot run here: {probe.cannot_run}") from error
    here = [b.name for b in BACKENDS.values() if b.name not in _DEVELOPMENT and _runs(b.probe())]
    plain = FAMILIES[manifest.family].plain(name) if manifest.family in FAMILIES else name
    rebuild = rebuilding(plain, here[0] if here else "onnxruntime")
    raise HostError(
        f"{folder}: {name} needs backend {backend}, which cannot run here: {probe.reason}",
        f"{probe.hint}; or rebuild it for this machine: {rebuild}" if probe.hint else f"rebuild it: {rebuild}",
    )


def remedies(manifest: Manifest, verdicts: Iterable[Verdict]) -> list[str]:
    """What to type so that more targets of `manifest`, of several, run here: what to install, or to build besides."""
    lines, running = [], []
    for verdict in verdicts:
        entries = manifest.targets[verdict.target].components
        if verdict.fault is None:
            running += [entry.backend for entry in entries.values()]
            continue
        missing = dict.fromkeys(entries[fit.component].backend for fit in verdict.fits if fit.fault is not None)
        probes = [BACKENDS[name].probe() for name in missing if name in BACKENDS]
        # Where a GPU is missing, installing its library is of no use: only what a library alone lacks is said.
        lines += [f"{verdict.target}: {probe.hint}" for probe in probes if not probe.available and probe.hint]
    here = target_here()
    backend = here.partition(":")[0]
    if not running or (BACKENDS[backend].probe().identity and backend not in running):
        more = f"--set targets.{len(manifest.targets)}={here}"
        lines.append(f"build it with a target for this machine: sdcompile build RECIPE {more}")
    return list(dict.fromkeys(lines))


def target_here() -> str:
    """A target that this machine can build and run, as a recipe names it; GPUs first."""
    found = {b.name: probe for b in BACKENDS.values() if b.name not in _DEVELOPMENT and _runs(probe := b.probe())}
    for name, probe in sorted(found.items(), key=lambda row: not row[1].identity):
        options = BACKENDS[name].options
        if "compute_capabilities" not in options.model_fields:
            return name
        with suppress(ValidationError):  # an architecture that this compiler does not know
            options.model_validate({"compute_capabilities": [probe.identity["architecture"]]})
            return f"{name}:{probe.identity['architecture']}"
    return "onnxruntime"


def nothing_runs(folder: Path, manifest: Manifest, verdicts: list[Verdict]) -> HostError:
    """The error of a bundle none of whose targets runs here."""
    lines = [f"  {verdict.target}: {words(folder, verdict)}" for verdict in verdicts]
    return HostError(
        f"{folder}: none of its {len(lines)} targets can run here\n" + "\n".join(lines),
        "\n".join(remedies(manifest, verdicts)),
    )


def _require(folder: Path, manifest: Manifest, verdict: Verdict) -> None:
    """Raise what keeps the only target, or the one asked for, from running."""
    if verdict.fault is None:
        return
    if not verdict.target or not isinstance(verdict.fault, HostError):
        raise verdict.fault
    verdicts = [judge(folder, one) for one in manifest.by_target().values()]
    running = [row.target for row in verdicts if row.fault is None]
    hint = remedies(manifest, verdicts)
    hint += [f"of its targets, {', '.join(running)} can: leave the target out, or name one of them"] if running else []
    raise HostError(f"{folder}: target {verdict.target} cannot run here: {words(folder, verdict)}", "\n".join(hint))


def words(folder: Path, verdict: Verdict) -> str:
    """What keeps a target from running, in one line that does not repeat the bundle's name."""
    assert verdict.fault is not None
    return verdict.fault.message.removeprefix(f"{folder}: ").replace("\n", " ")


def _reason(folder: Path, target: str, passed: list[Verdict]) -> str:
    if not passed:
        return f"{target}, the preferred target"
    others = "; ".join(f"{verdict.target}: {words(folder, verdict)}" for verdict in passed)
    return f"{target}, the first target that runs here (not {others})"


def _runs(probe: Probe) -> bool:
    return probe.available and not probe.cannot_run
