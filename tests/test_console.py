"""What people and programs see of a build: a live table, plain lines, JSON events, and pages of results."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sdcompile import console
from sdcompile.console import terminal
from sdcompile.console.observers import JsonObserver, LineObserver, LiveObserver, Observer
from sdcompile.errors import RecipeError
from sdcompile.store import Freed


@dataclass(frozen=True)
class Step:
    component: str
    stage: str
    op: str

    @property
    def name(self) -> str:
        return f"{self.component}.{self.stage}.{self.op}"


NAMES = """
    unet.fetch.checkpoint vae.fetch.checkpoint pipeline.fetch.assets pipeline.compile.tokenizer
    pipeline.compile.samplers unet.export.onnx vae_decoder.export.onnx unet.compile.openvino
    unet.verify.engine pipeline.verify.images pipeline.package.bundle
"""
STEPS = tuple(Step(*name.split(".")) for name in NAMES.split())
FETCH, VAE, ASSETS, TOKENIZER, _, EXPORT, VAE_EXPORT, *_ = STEPS


def go_on(observer: Observer) -> None:
    """A build up to the middle of an export."""
    observer.step_hit(FETCH)
    observer.step_start(VAE)
    observer.step_done(VAE, 74.2, 3 << 30)
    observer.step_start(TOKENIZER)
    observer.step_done(TOKENIZER, 0.4, None)
    observer.step_start(VAE_EXPORT)
    observer.step_failed(VAE_EXPORT, ValueError("no [good]\nsecond line"))
    observer.step_start(EXPORT)
    observer.step_say(EXPORT, "writing [bold]weights[/bold]", 0.43)


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def live(width: int, **options: Any) -> tuple[LiveObserver, io.StringIO]:
    from rich.console import Console

    stream = io.StringIO()
    return LiveObserver(Console(file=stream, width=width, force_terminal=True, **options)), stream


def drawn(width: int, **options: Any) -> list[str]:
    observer, stream = live(width, **options)
    for step in STEPS:
        observer._cell(step)
    go_on(observer)
    observer._console().print(observer.render())
    return stream.getvalue().rstrip("\n").split("\n")


# Choosing


def test_the_mode_follows_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(console.observer(json_mode=True), JsonObserver)
    assert isinstance(console.observer(), LineObserver)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(console.observer(), LiveObserver)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(console.observer(), LineObserver)


# JSON


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.err == ""
    found = [json.loads(line, parse_constant=pytest.fail) for line in captured.out.splitlines()]
    for event in found:
        assert isinstance(event.pop("time"), float)
    return found


def test_json_mode_writes_one_event_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    observer = console.observer(json_mode=True)
    observer.warn("no revision")
    with observer.watching(STEPS[:2]):
        go_on(observer)
    found = events(capsys)
    assert [event["event"] for event in found] == [
        "warning",
        "plan",
        "step_hit",
        "step_start",
        "step_done",
        "step_start",
        "step_done",
        "step_start",
        "step_failed",
        "step_start",
        "step_progress",
    ]
    name = {"step": "vae.fetch.checkpoint", "component": "vae", "stage": "fetch", "op": "checkpoint"}
    assert found[1]["steps"][1] == name
    assert found[4] == {"event": "step_done", **name, "seconds": 74.2, "peak_bytes": 3 << 30}
    assert found[8]["error"] == "no [good]"
    assert (found[10]["text"], found[10]["fraction"]) == ("writing [bold]weights[/bold]", 0.43)


def test_json_progress_is_throttled_per_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("sdcompile.console.observers.time.monotonic", lambda: clock[0])
    observer = JsonObserver()
    for _ in range(100):
        observer.step_say(EXPORT, "x", 0.1)
        observer.step_say(FETCH, "x", 0.1)
        clock[0] += 0.01
    assert len(events(capsys)) == 4


def test_json_holds_no_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_result({"reports": {"unet": {"snr": float("inf"), "x": (float("nan"), Path("p"))}}}, json_mode=True)
    assert events(capsys) == [{"event": "result", "reports": {"unet": {"snr": None, "x": [None, "p"]}}}]


def test_a_reader_that_goes_away_does_not_stop_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    terminal.emit("a")
    terminal.emit("b")
    sys.stdout.close()


def test_every_result_has_a_json_event(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    console.show_plan([PLAN[0]], ["note"], json_mode=True)
    console.show_explanation({"step": "a"}, json_mode=True)
    console.show_doctor({"cpu": "x"}, json_mode=True)
    console.show_manifest(tmp_path, {"name": "x"}, "d", json_mode=True)
    console.show_gc(Freed(5, 1, 0), dry_run=True, json_mode=True)
    console.report_error(RecipeError("m", "h"), json_mode=True)
    with console.generating(2, json_mode=True) as progress:
        progress(0, 1, 0)
        progress(0, 2, 0)
        progress(1, 0, 0)
    found = events(capsys)
    names = ["plan", "explanation", "doctor", "bundle", "gc", "error", "generate_progress", "generate_progress"]
    assert [event["event"] for event in found] == names
    assert found[0] == {"event": "plan", "steps": [PLAN[0]], "notes": ["note"]}
    assert found[5] == {"event": "error", "kind": "RecipeError", "exit_code": 2, "message": "m", "hint": "h"}
    assert found[7] == {"event": "generate_progress", "images": 1, "total": 2}


# Lines


def test_lines_tell_a_build_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    observer = LineObserver()
    with observer.watching(STEPS):
        observer.warn("[x] is odd")
        go_on(observer)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "warning: [x] is odd",
        "unet.fetch.checkpoint: made before",
        "vae.fetch.checkpoint ...",
        "vae.fetch.checkpoint: done in 1m14s, peak 3.0 GiB",
        "pipeline.compile.tokenizer ...",
        "pipeline.compile.tokenizer: done in 0.4s",
        "vae_decoder.export.onnx ...",
        "vae_decoder.export.onnx: failed: no [good]",
        "unet.export.onnx ...",
    ]


def test_lines_of_progress_are_rare(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("sdcompile.console.observers.time.monotonic", lambda: clock[0])
    observer = LineObserver()
    observer.step_start(EXPORT)
    for tick in range(12):
        clock[0] += 1
        observer.step_say(EXPORT, "tracing [a]", tick / 12)
    for _ in range(20):
        clock[0] += 1
        observer.step_say(EXPORT, "waiting")
    assert capsys.readouterr().err.splitlines() == [
        "unet.export.onnx ...",
        "unet.export.onnx: tracing [a] 33%",
        "unet.export.onnx: tracing [a] 75%",
        "unet.export.onnx: waiting",
    ]


# The live table


def test_the_live_table_at_120_columns() -> None:
    lines = drawn(120, color_system=None)
    assert [line.rstrip() for line in lines] == [
        "            fetch    export   compile  verify   package",
        "unet        =        ▸ 0.0s   ·        ·",
        "vae         ✓ 1m14s",
        "vae_decoder          ✗ 0.0s",
        "pipeline    ·                 · 1/2    ·        ·",
        "3/11 unet.export.onnx ━━━━━━━━━╌╌╌╌╌╌╌╌╌╌╌ 43% writing [bold]weights[/bold]",
    ]


def test_the_live_table_at_60_columns_fits_and_keeps_every_column() -> None:
    lines = drawn(60, color_system=None)
    assert all(len(line) <= 60 for line in lines)
    assert lines[0].split() == ["fetch", "export", "compile", "verify", "package"]
    assert lines[-1] == "3/11 unet.export.onnx ━━━━╌╌╌╌╌╌ 43% writing [bold]weights[…"


def test_a_terminal_too_narrow_for_the_table_keeps_the_line() -> None:
    assert drawn(40, color_system=None) == ["3/11 unet.export.onnx ━━━╌╌╌ 43% writin…"]


def test_a_terminal_without_unicode_gets_ascii() -> None:
    from rich.console import Console

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    observer = LiveObserver(Console(file=stream, width=80, force_terminal=True, color_system=None))
    for step in STEPS:
        observer._cell(step)
    go_on(observer)
    observer.step_say(EXPORT, "writing", 0.5)
    observer._console().print(observer.render())
    stream.seek(0)
    assert stream.read().splitlines()[-1] == "3/11 unet.export.onnx ######------- 50% writing"


def test_the_live_table_is_coloured_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[32m✓" in "\n".join(drawn(120, color_system="standard"))
    monkeypatch.setenv("NO_COLOR", "1")
    text = "\n".join(drawn(120, color_system="standard"))
    assert "✓ 1m14s" in text
    assert not any(f"\x1b[{code}m" in text for code in (31, 32, 33, 36))


def test_the_live_table_draws_a_whole_build_and_gives_the_cursor_back() -> None:
    observer, stream = live(100, color_system=None)
    with observer.watching(STEPS):
        observer.warn("mind [this]")
        for step in STEPS:
            observer.step_start(step)
            observer.step_done(step, 1.0, 1 << 30)
    text = stream.getvalue()
    assert "warning: mind [this]" in text
    assert "11/11 steps, peak 1.0 GiB" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_ctrl_c_leaves_the_last_state_and_the_cursor() -> None:
    observer, stream = live(100, color_system=None)

    def build() -> None:
        with observer.watching(STEPS):
            observer.step_start(EXPORT)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert "unet.export.onnx" in stream.getvalue()
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_a_step_that_was_not_announced_is_shown_too() -> None:
    observer, stream = live(100, color_system=None)
    with observer.watching(STEPS[:1]):
        observer.step_start(EXPORT)
        observer.step_done(EXPORT, 2.0)
    assert "✓ 2.0s" in stream.getvalue()


# Pages

PLAN = [
    {
        "step": "unet.fetch.checkpoint", "component": "unet", "stage": "fetch", "op": "checkpoint", "state": "hit",
        "reason": "", "memory_bytes": 1 << 30, "disk_bytes": 1 << 20, "key": "k",
    },
    {
        "step": "unet.export.onnx", "component": "unet", "stage": "export", "op": "onnx", "state": "make",
        "reason": "params.opset: 20 -> 21 [x]", "memory_bytes": 5 << 30, "disk_bytes": 3 << 30, "key": "k",
    },
    {
        "step": "unet.compile.openvino", "component": "unet", "stage": "compile", "op": "openvino", "state": "cannot",
        "reason": "openvino not installed (pip install 'sdcompile[openvino]')", "memory_bytes": 0, "disk_bytes": 0,
        "key": "k",
    },
]  # fmt: skip


def test_the_plan_is_a_table_on_stdout_with_its_warnings_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_plan(PLAN, ["no [revision]"])
    captured = capsys.readouterr()
    assert captured.err == "warning: no [revision]\n"
    rows = [" ".join(line.split()) for line in captured.out.splitlines()]
    assert "unet.fetch.checkpoint hit" in rows
    assert "unet.export.onnx make 5.0 GiB 3.0 GiB params.opset: 20 -> 21 [x]" in rows
    assert "unet.compile.openvino cannot - - openvino not installed (pip install 'sdcompile[openvino]')" in rows
    assert rows[-1] == "2 of 3 steps to make: at most 5.0 GiB of memory, 3.0 GiB of disk"


def test_the_plan_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    console.show_plan(PLAN)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 70
    assert any("unet.compile.openvino" in line for line in lines)


def test_a_plan_with_nothing_to_do_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_plan(PLAN[:1])
    assert capsys.readouterr().out.splitlines()[-1] == "1 steps: nothing to make"


def test_an_error_says_what_is_and_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = RecipeError("r.yaml:3: [red]x[/red]: fault\nr.yaml:4: second", "type [this]")
    console.report_error(fault)
    assert capsys.readouterr() == ("", "error: r.yaml:3: [red]x[/red]: fault\nr.yaml:4: second\ntype [this]\n")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    console.report_error(fault)
    text = capsys.readouterr().err
    assert "recipe error" in text
    assert "r.yaml:3: [red]x[/red]: fault" in text
    assert "type [this]" in text


def test_the_result_names_the_bundle_and_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    unet = {
        "passed": True, "backend": "openvino", "precision": "bf16", "worst": {"snr_db": 33.2, "cosine": 0.99991},
        "floor": {"min_snr_db": 30, "min_cosine": 0.999},
    }  # fmt: skip
    images = {"passed": False, "worst": {"psnr_db": 20.0}, "floor": {"min_psnr_db": 30}}
    console.show_result(
        {
            "name": "x", "bundle": "out/[x].sdc", "bytes": 10**9, "folders": {"unet.export.onnx": "store/k"},
            "fallbacks": {"vae": "asked for bf16"}, "reports": {"unet": unet, "pipeline": images},
        }
    )  # fmt: skip
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "unet openvino bf16 SNR 33.2 dB, cosine 0.999910 30 dB, 0.999 passed" in rows
    assert "whole images PSNR 20.0 dB 30 dB FAILED" in rows
    assert "vae: asked for bf16" in rows
    assert "out/[x].sdc (954 MiB)" in rows
    assert 'next: sdcompile generate out/[x].sdc "a prompt"' in rows
    assert "unet.export.onnx: store/k" in rows


def test_an_explanation_shows_changes_and_parts(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"step": "a.b.c", "key": "k", "state": "make", "made_before": True, "changes": ["x: [1] -> [2]"]}
    console.show_explanation({**facts, "parts": {"x": "[bold]"}})
    text = capsys.readouterr().out
    assert text.splitlines()[:3] == ["a.b.c: to be made", "changed since the last time:", "  x: [1] -> [2]"]
    assert '"x": "[bold]"' in text
    console.show_explanation({**facts, "changes": [], "made_before": False, "parts": {}})
    assert "never made before" in capsys.readouterr().out


def test_the_doctor_says_why_a_backend_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    backend = {
        "name": "openvino", "available": False, "version": None, "devices": [], "precisions": ["fp32"],
        "reason": "not installed", "hint": "pip install 'sdcompile[openvino]'", "notes": [],
    }  # fmt: skip
    console.show_doctor(
        {
            "cpu": "x", "threads": 2, "features": [], "memory_bytes": 2 << 30, "memory_available_bytes": 1 << 30,
            "store": "artifacts", "disk_free_bytes": 5 << 30, "backends": [backend],
        }
    )  # fmt: skip
    text = capsys.readouterr().out
    assert "1.0 GiB available of 2.0 GiB" in text
    assert "not installed: pip install 'sdcompile[openvino]'" in text


def test_a_manifest_is_shown_without_the_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    manifest = {
        "name": "x", "family": "sd", "source": {"id": "builtin:tiny"}, "licence": None, "built_at": "now",
        "sdcompile": "0.1.0", "shapes": {"B": [1, 1, 4], "H": [64, 64, 64]}, "samplers": {"ddim": {}},
        "defaults": {"sampler": "ddim"}, "tools": {"onnx": "1"},
        "files": {"components/unet/m.xml": {"bytes": 2048, "sha256": ""}},
        "components": {
            "unet": {
                "backend": "openvino", "precision": "bf16", "verification": {"worst": {"snr_db": 30.0}},
                "notes": ["in [fp32]"],
            }
        },
    }  # fmt: skip
    console.show_manifest(Path("a.sdc"), manifest, "abc")
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for row in (
        "digest abc",
        "licence not stated by the source",
        "shapes B 1-4 (1), H 64",
        "unet openvino bf16 SNR 30.0 dB 2.0 KiB",
        "unet: in [fp32]",
    ):
        assert row in rows


def test_gc_says_what_it_freed(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_gc(Freed(3 << 30, 4, 1), dry_run=True)
    assert capsys.readouterr().out == "would free 3.0 GiB: 4 artifacts, 1 leftovers of killed builds\n"


def test_generating_is_silent_in_a_pipe_and_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.generating(2) as progress:
        progress(0, 1, 0)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with console.generating(2) as progress:
        progress(1, 3, 20)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "image 2 of 2, step 3 of 20" in captured.err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0s"), (9.94, "9.9s"), (9.96, "10s"), (59.6, "1m00s"), (187, "3m07s"), (7500, "2h05m")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert terminal.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0"), (999, "999 B"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB"), (10**12, "931 GiB")],
)
def test_sizes_are_short(count: int | None, text: str) -> None:
    assert terminal.size(count) == text


def test_rich_is_imported_only_to_show_something() -> None:
    import subprocess

    code = (
        "import sys; from sdcompile import console; console.observer(json_mode=True).warn('x');"
        "console.show_gc.__doc__; sys.exit('rich' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
