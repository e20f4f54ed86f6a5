"""What people and programs see: the only room that knows rich, and it imports it late.

Results go to stdout, progress, warnings and errors to stderr. With `json_mode` everything is one
JSON event per line on stdout (each with "event" and "time"). Text from outside - prompts, paths,
messages - is never read as markup. This room knows how to show a thing, not how it came about;
what it is given has the attributes and keys it names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sdcompile.console import terminal
from sdcompile.console.observers import JsonObserver, LineObserver, LiveObserver, Observer, SayObserver, Throttled

if TYPE_CHECKING:
    from pathlib import Path

    from sdcompile.errors import SdcompileError
    from sdcompile.runtime.saving import Saved
    from sdcompile.spec import Say
    from sdcompile.store import Freed

__all__ = [
    "Observer",
    "SayObserver",
    "generating",
    "note",
    "observer",
    "progressing",
    "report_error",
    "show_commands",
    "show_doctor",
    "show_explanation",
    "show_fitness",
    "show_gc",
    "show_images",
    "show_layers",
    "show_manifest",
    "show_measured",
    "show_plan",
    "show_prompt",
    "show_result",
    "show_selftest",
]


def observer(*, json_mode: bool = False) -> Observer:
    """Who watches a build: JSON events, a live table on a terminal, or plain lines elsewhere."""
    if json_mode:
        return JsonObserver()
    return LiveObserver() if terminal.is_live() else LineObserver()


def note(text: str) -> None:
    """A line for a person, on stderr."""
    terminal.to_stderr(text)


def report_error(error: SdcompileError, *, json_mode: bool = False) -> None:
    """An error a user can act on: what is, and what to do."""
    if json_mode:
        terminal.emit(
            "error", kind=type(error).__name__, exit_code=error.exit_code, message=error.message, hint=error.hint
        )
        return
    if not terminal.is_live():
        terminal.to_stderr(f"error: {error}")
        return
    from sdcompile.console import pages

    terminal.stderr().print(pages.error(error))


@contextmanager
def warnings_told(*, json_mode: bool = False) -> Iterator[None]:
    """Tell our own warnings as lines (or events), without the source line that raised them."""
    from sdcompile.runtime import SdcompileWarning

    with warnings.catch_warnings():
        plain = warnings.showwarning

        def tell(message: Warning | str, category: type[Warning], *where: Any, **rest: Any) -> None:
            if not issubclass(category, SdcompileWarning):
                plain(message, category, *where, **rest)
            elif json_mode:
                terminal.emit("warning", text=str(message))
            else:
                terminal.to_stderr(f"warning: {message}", style="yellow")

        warnings.showwarning = tell
        yield


def show_plan(rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = (), *, json_mode: bool = False) -> None:
    """The plan as a table. `rows` have step, state (hit, make, skip, cannot), reason, memory_bytes, disk_bytes."""
    if json_mode:
        terminal.emit("plan", steps=list(rows), notes=list(notes))
        return
    from sdcompile.console import pages

    for text in notes:
        terminal.to_stderr(f"warning: {text}", style="yellow")
    terminal.stdout().print(pages.plan(rows))
    terminal.to_stdout(pages.plan_sums(rows))


def show_explanation(facts: Mapping[str, Any], *, json_mode: bool = False) -> None:
    """One step: is it made, what changed since the last time, and what its key is made of."""
    _show("explanation", facts, "explanation", json_mode)


def show_doctor(facts: Mapping[str, Any], *, json_mode: bool = False) -> None:
    """Backends and resources of this machine."""
    _show("doctor", facts, "doctor", json_mode)


def show_result(facts: Mapping[str, Any], *, json_mode: bool = False) -> None:
    """The end of a build: the bundle, its size, and how each engine compares with its reference."""
    _show("result", facts, "result", json_mode)


def show_manifest(bundle: Path, manifest: Mapping[str, Any], digest: str, *, json_mode: bool = False) -> None:
    """What a bundle says of itself."""
    _show("bundle", {"path": str(bundle), "digest": digest, "manifest": manifest}, "manifest", json_mode)


def show_extracted(bundle: Path, *, json_mode: bool = False) -> None:
    """The bundle that was written, and its size."""
    from sdcompile.files import size_bytes

    if json_mode:
        terminal.emit("extracted", bundle=str(bundle), bytes=size_bytes(bundle))
        return
    terminal.to_stdout(f"{bundle} ({terminal.size(size_bytes(bundle))})")


def show_measured(result: Mapping[str, Any], tables: Sequence[Any], *, json_mode: bool = False) -> None:
    """A result of measuring: as one event, or as tables (title, columns, rows, notes)."""
    _show(str(result["kind"]), result if json_mode else {"tables": tables}, "measured", json_mode)


def show_sensitivity(facts: Mapping[str, Any], *, json_mode: bool = False) -> None:
    """What int8 in each group of layers costs."""
    _show("sensitivity", facts, "sensitivity", json_mode)


def show_layers(tables: Mapping[str, Any], *, json_mode: bool = False) -> None:
    """Layer tables: component -> engine -> {claims, summary, io, layers}."""
    _show("layers", {"components": tables}, "layers", json_mode)


def show_fitness(facts: Mapping[str, Any], *, json_mode: bool = False) -> None:
    """Whether this machine can run a bundle, per component, or per target where there are several."""
    if json_mode:
        terminal.emit("fitness", **facts)
        return
    from sdcompile.console import fitness

    _print(fitness.page(facts))


def show_commands(
    folder: Path,
    commands: Mapping[str, Sequence[str]],
    found: Mapping[str, Mapping[str, Any]],
    *,
    json_mode: bool = False,
) -> None:
    """Where Polygraphy files were written, the commands to give in each component's folder, and what those that were
    run found."""
    _show("polygraphy", {"folder": str(folder), "commands": commands, "found": found}, "commands", json_mode)


def show_selftest(path: Path, report: Mapping[str, Any], *, json_mode: bool = False) -> None:
    """What became of each NVIDIA backend, and where the whole report lies."""
    _show("selftest", {"path": str(path), **report}, "selftest", json_mode)


def show_gc(freed: Freed, *, dry_run: bool = False, json_mode: bool = False) -> None:
    """What `gc` freed, or would free."""
    facts = {"bytes": freed.bytes, "artifacts": freed.artifacts, "leftovers": freed.leftovers, "dry_run": dry_run}
    _show("gc", facts, "freed", json_mode)


def show_images(files: Sequence[Saved], *, json_mode: bool = False) -> None:
    """The images that were written."""
    rows = [{"path": str(f.path), "prompt": f.prompt, "seed": f.seed, "seconds": round(f.seconds, 3)} for f in files]
    _show("images", {"images": rows}, "images", json_mode)


def show_prompt(facts: Mapping[str, Any], *, json_mode: bool = False) -> None:
    """What a bundle reads in a prompt (see runtime.linting.Report)."""
    _show("prompt", facts, "prompt", json_mode)


@contextmanager
def generating(total: int, *, json_mode: bool = False) -> Iterator[Callable[[int, int, int], None]]:
    """Progress of `generate`: yields a function of (images finished, step in hand, steps or 0 if unknown)."""
    if json_mode:
        last = [-1]

        def tell(images: int, step: int, steps: int) -> None:
            if images != last[0]:
                last[0] = images
                terminal.emit("generate_progress", images=images, total=total)

        yield tell
        return
    if not terminal.is_live():
        yield lambda images, step, steps: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=terminal.stderr(), transient=True) as bar:
        task = bar.add_task(f"image 1 of {total}", total=total)

        def show(images: int, step: int, steps: int) -> None:
            of = f" of {steps}" if steps else ""
            text = f"image {min(images + 1, total)} of {total}" + (f", step {step}{of}" if step else "")
            bar.update(task, completed=images + (step / steps if steps else 0), description=text)

        yield show


@contextmanager
def progressing(*, json_mode: bool = False) -> Iterator[Say]:
    """Progress of work that is no build: yields a `Say`. A bar on a terminal, a line now and then elsewhere."""
    if json_mode or not terminal.is_live():
        yield Throttled(json_mode)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        BarColumn(bar_width=20), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=terminal.stderr(), transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def say(text: str, fraction: float | None = None) -> None:
            bar.update(task, description=text, completed=fraction)

        yield say


def _show(event: str, facts: Mapping[str, Any], page: str, json_mode: bool) -> None:
    if json_mode:
        terminal.emit(event, **facts)
        return
    from sdcompile.console import pages

    _print(getattr(pages, page)(facts))


def _print(parts: Iterable[Any]) -> None:
    for part in parts:
        terminal.stdout().print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)
