"""Who watches a build: a live table, plain lines, or JSON events.

Steps are given as objects with `name` ("unet.export.onnx"), `component`, `stage` and `op`. A
step that was not announced by `watching` (a component rebuilt after a missed floor) is taken
as it comes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sdcompile.console import terminal
from sdcompile.spec import PIPELINE, STAGES, Say

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# How often a step's progress is worth a JSON event, and a line in a log.
JSON_EVERY_S = 0.5
LINE_EVERY_S = 5.0


class StepLike(Protocol):
    """What an observer needs of a step."""

    @property
    def name(self) -> str: ...
    @property
    def component(self) -> str: ...
    @property
    def stage(self) -> str: ...
    @property
    def op(self) -> str: ...


class Observer(Protocol):
    """What a build tells while it goes on."""

    def watching(self, steps: Iterable[StepLike]) -> AbstractContextManager[None]:
        """Around a build of `steps`."""

    def step_hit(self, step: StepLike) -> None:
        """The step was made before."""

    def step_start(self, step: StepLike) -> None:
        """The step begins."""

    def step_say(self, step: StepLike, text: str, fraction: float | None = None) -> None:
        """The step tells what it does; `fraction` of it is done (None = unknown)."""

    def step_done(self, step: StepLike, seconds: float, peak_bytes: int | None = None) -> None:
        """The step is made."""

    def step_failed(self, step: StepLike, error: BaseException) -> None:
        """The step could not finish."""

    def warn(self, text: str) -> None:
        """Something a person should know, though the build goes on."""

    def note(self, text: str) -> None:
        """Something worth a line."""


def _first_line(error: BaseException) -> str:
    text = getattr(error, "message", "") or str(error) or type(error).__name__
    return str(text).splitlines()[0]


class JsonObserver:
    """One JSON event per line on stdout."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    @contextmanager
    def watching(self, steps: Iterable[StepLike]) -> Iterator[None]:
        terminal.emit("plan", steps=[_named(step) for step in steps])
        yield

    def step_hit(self, step: StepLike) -> None:
        terminal.emit("step_hit", **_named(step))

    def step_start(self, step: StepLike) -> None:
        terminal.emit("step_start", **_named(step))

    def step_say(self, step: StepLike, text: str, fraction: float | None = None) -> None:
        now = time.monotonic()
        if now - self._said.get(step.name, -JSON_EVERY_S) >= JSON_EVERY_S:
            self._said[step.name] = now
            terminal.emit("step_progress", **_named(step), text=text, fraction=fraction)

    def step_done(self, step: StepLike, seconds: float, peak_bytes: int | None = None) -> None:
        terminal.emit("step_done", **_named(step), seconds=round(seconds, 3), peak_bytes=peak_bytes)

    def step_failed(self, step: StepLike, error: BaseException) -> None:
        terminal.emit("step_failed", **_named(step), error=_first_line(error))

    def warn(self, text: str) -> None:
        terminal.emit("warning", text=text)

    def note(self, text: str) -> None:
        terminal.emit("note", text=text)


def _named(step: StepLike) -> dict[str, str]:
    return {"step": step.name, "component": step.component, "stage": step.stage, "op": step.op}


class LineObserver:
    """Plain lines on stderr, for logs and pipes."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[float, str]] = {}

    @contextmanager
    def watching(self, steps: Iterable[StepLike]) -> Iterator[None]:
        yield

    def step_hit(self, step: StepLike) -> None:
        terminal.to_stderr(f"{step.name}: made before")

    def step_start(self, step: StepLike) -> None:
        terminal.to_stderr(f"{step.name} ...")
        self._said[step.name] = (time.monotonic(), "")

    def step_say(self, step: StepLike, text: str, fraction: float | None = None) -> None:
        last, said = self._said.get(step.name, (0.0, ""))
        now = time.monotonic()
        if now - last < LINE_EVERY_S or (text == said and fraction is None):
            return
        self._said[step.name] = (now, text)
        percent = "" if fraction is None else f" {fraction:.0%}"
        terminal.to_stderr(f"{step.name}: {text}{percent}")

    def step_done(self, step: StepLike, seconds: float, peak_bytes: int | None = None) -> None:
        peak = f", peak {terminal.size(peak_bytes)}" if peak_bytes else ""
        terminal.to_stderr(f"{step.name}: done in {terminal.duration(seconds)}{peak}")

    def step_failed(self, step: StepLike, error: BaseException) -> None:
        terminal.to_stderr(f"{step.name}: failed: {_first_line(error)}")

    def warn(self, text: str) -> None:
        terminal.to_stderr(f"warning: {text}")

    def note(self, text: str) -> None:
        terminal.to_stderr(text)


class Throttled:
    """A `Say` that tells no more often than is useful: JSON events, or lines on stderr."""

    def __init__(self, json_mode: bool) -> None:
        self._json, self._last = json_mode, -LINE_EVERY_S

    def __call__(self, text: str, fraction: float | None = None) -> None:
        now = time.monotonic()
        if now - self._last < (JSON_EVERY_S if self._json else LINE_EVERY_S):
            return
        self._last = now
        if self._json:
            terminal.emit("progress", text=text, fraction=fraction)
        else:
            terminal.to_stderr(text if fraction is None else f"{text} ({fraction:.0%})")


@dataclass(frozen=True)
class SayObserver:
    """Tells a `Say` of a build that is only a part of the work."""

    say: Say

    @contextmanager
    def watching(self, steps: Iterable[StepLike]) -> Iterator[None]:
        yield

    def step_hit(self, step: StepLike) -> None:
        """What is there already is not worth a word here."""

    def step_start(self, step: StepLike) -> None:
        self.say(step.name, None)

    def step_say(self, step: StepLike, text: str, fraction: float | None = None) -> None:
        self.say(f"{step.name}: {text}", None)

    def step_done(self, step: StepLike, seconds: float, peak_bytes: int | None = None) -> None:
        """The next step's start says it."""

    def step_failed(self, step: StepLike, error: BaseException) -> None:
        """The error itself is shown by whoever catches it."""

    def warn(self, text: str) -> None:
        terminal.to_stderr(f"warning: {text}")

    def note(self, text: str) -> None:
        self.say(text, None)


@dataclass
class _Cell:
    """Where one step of the live table is."""

    component: str
    stage: str
    state: str = "pending"
    started: float = 0.0
    seconds: float = 0.0
    fraction: float | None = None
    text: str = ""


@dataclass(frozen=True)
class _Signs:
    pending: str = "·"
    running: str = "▸"
    done: str = "✓"
    hit: str = "="
    failed: str = "✗"
    full: str = "━"
    empty: str = "╌"


_ASCII = _Signs(".", ">", "ok", "=", "FAIL", "#", "-")
_STYLES = {"pending": "dim", "running": "bold cyan", "done": "green", "hit": "dim green", "failed": "bold red"}
_CELL_COLUMNS = 8


@dataclass
class LiveObserver:
    """A stage x component table on stderr, redrawn in place. `console` is for tests."""

    console: Console | None = None
    cells: dict[str, _Cell] = field(default_factory=dict)
    current: str = ""
    _peak_bytes: int = 0

    def _console(self) -> Console:
        if self.console is None:
            self.console = terminal.stderr()
        return self.console

    @contextmanager
    def watching(self, steps: Iterable[StepLike]) -> Iterator[None]:
        from rich.live import Live

        for step in steps:
            self._cell(step)
        # Leaving by an exception (Ctrl-C too) still draws the last state and gives the cursor back.
        with Live(get_renderable=self.render, console=self._console(), refresh_per_second=5, vertical_overflow="crop"):
            yield
            self.current = ""

    def _cell(self, step: StepLike) -> _Cell:
        return self.cells.setdefault(step.name, _Cell(step.component, step.stage))

    def step_hit(self, step: StepLike) -> None:
        self._cell(step).state = "hit"

    def step_start(self, step: StepLike) -> None:
        cell = self._cell(step)
        cell.state, cell.started, cell.fraction, cell.text = "running", time.monotonic(), None, ""
        self.current = step.name

    def step_say(self, step: StepLike, text: str, fraction: float | None = None) -> None:
        cell = self._cell(step)
        cell.text = " ".join(text.split())
        cell.fraction = None if fraction is None else min(1.0, max(0.0, fraction))

    def step_done(self, step: StepLike, seconds: float, peak_bytes: int | None = None) -> None:
        cell = self._cell(step)
        cell.state, cell.seconds = "done", seconds
        self._peak_bytes = max(self._peak_bytes, peak_bytes or 0)

    def step_failed(self, step: StepLike, error: BaseException) -> None:
        cell = self._cell(step)
        cell.state, cell.seconds, cell.text = "failed", time.monotonic() - cell.started, _first_line(error)

    def warn(self, text: str) -> None:
        self._console().print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        self._console().print(text, markup=False, soft_wrap=True)

    def render(self) -> RenderableType:
        """The table and the line about the running step, never wider than the terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        console = self._console()
        signs = _Signs() if console.encoding.lower().startswith("utf") else _ASCII
        stages = [stage for stage in STAGES if any(c.stage == stage for c in self.cells.values())]
        components = sorted(dict.fromkeys(c.component for c in self.cells.values()), key=lambda name: name == PIPELINE)
        names = max((len(name) for name in components), default=0)
        parts: list[RenderableType] = []
        if names + (_CELL_COLUMNS + 1) * len(stages) <= console.width:
            table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
            table.add_column("", no_wrap=True)
            for stage in stages:
                table.add_column(stage, no_wrap=True, min_width=_CELL_COLUMNS, max_width=10, header_style="dim")
            for component in components:
                row = [self._shown(component, stage, signs) for stage in stages]
                table.add_row(Text(component), *row)
            parts.append(table)
        parts.append(self._line(console.width, signs))
        return Group(*parts)

    def _shown(self, component: str, stage: str, signs: _Signs) -> RenderableType:
        from rich.text import Text

        cells = [c for c in self.cells.values() if (c.component, c.stage) == (component, stage)]
        if not cells:
            return Text("")
        state = next((s for s in ("failed", "running") if any(c.state == s for c in cells)), "")
        finished = [c for c in cells if c.state in ("done", "hit")]
        seconds = sum(c.seconds for c in cells)
        if not state:
            if len(finished) < len(cells):
                count = f" {len(finished)}/{len(cells)}" if finished else ""
                return Text(f"{signs.pending}{count}", style=_STYLES["pending"])
            state = "done" if any(c.state == "done" for c in cells) else "hit"
        if state == "running":
            seconds += sum(time.monotonic() - c.started for c in cells if c.state == "running")
        sign = getattr(signs, state)
        return Text(sign if state == "hit" else f"{sign} {terminal.duration(seconds)}", style=_STYLES[state])

    def _line(self, width: int, signs: _Signs) -> RenderableType:
        from rich.text import Text

        done = sum(c.state in ("done", "hit") for c in self.cells.values())
        text = Text(f"{done}/{len(self.cells)} steps", style="dim", no_wrap=True, overflow="ellipsis")
        cell = self.cells.get(self.current)
        if cell is None or cell.state not in ("running", "failed"):
            if self._peak_bytes:
                text.append(f", peak {terminal.size(self._peak_bytes)}")
            return _cut(text, width)
        text = Text(f"{done}/{len(self.cells)} ", style="dim", no_wrap=True, overflow="ellipsis")
        text.append(self.current, style="bold")
        if cell.state == "running" and cell.fraction is not None:
            columns = max(5, min(20, width // 6))
            full = round(cell.fraction * columns)
            text.append(f" {signs.full * full}", style="cyan")
            text.append(f"{signs.empty * (columns - full)} {cell.fraction:.0%}", style="dim")
        if cell.text:
            text.append(f" {cell.text}", style=_STYLES["failed"] if cell.state == "failed" else "")
        return _cut(text, width)


def _cut(text: Any, width: int) -> Any:
    text.truncate(width, overflow="ellipsis")
    return text
