"""What the owner of a GPU runs once: models through every NVIDIA backend, and one report to send back.

The tiny model always; a full-size one, timed beside torch on the GPU, when it is named. Where there is no GPU
it still builds what can be built and says what was not run. Whatever goes wrong becomes a line of the report,
which is written after every row, so that a crash leaves what came before it. It knows which backends are
NVIDIA's and nothing of how they work.
"""

from __future__ import annotations

import json
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdcompile import __version__, machine, run, status
from sdcompile.backends import BACKENDS
from sdcompile.backends.trt import driver
from sdcompile.errors import SdcompileError, VerifyError
from sdcompile.recipe import Recipe, known_names

if TYPE_CHECKING:
    from sdcompile.console import Observer
    from sdcompile.store import Store


class Way(NamedTuple):
    """A way to run a model on an NVIDIA GPU: backend, precision, and the build options that make it."""

    backend: str
    precision: str
    build: Mapping[str, Any]


NVIDIA: Mapping[str, Way] = {
    "tensorrt_rtx-fp16": Way("tensorrt_rtx", "fp16", {}),
    "tensorrt_rtx-bf16": Way("tensorrt_rtx", "bf16", {}),
    "tensorrt_rtx-int8": Way("tensorrt_rtx", "int8", {}),
    "tensorrt-fp16": Way("tensorrt", "fp16", {}),
    "tensorrt-bf16": Way("tensorrt", "bf16", {}),
    "tensorrt-int8": Way("tensorrt", "int8", {}),
    "onnxruntime-cuda-fp16": Way("onnxruntime", "fp16", {"provider": "cuda"}),
    "onnxruntime-tensorrt-fp16": Way("onnxruntime", "fp16", {"provider": "tensorrt"}),
}
FULL = ("tensorrt_rtx-fp16", "tensorrt-fp16", "onnxruntime-cuda-fp16", "onnxruntime-tensorrt-fp16")
"""The ways that the full-size model takes: quantizing it would take longer than all the rest."""

PEERS = ("diffusers-cuda-fp16", "torch-compile-cuda-fp16")

_PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13",
             "tensorrt", "cuda-bindings")  # fmt: skip
_PROMPT, _STEPS, _IMAGES = "a large green star on a white background", 20, 3

_TINY: Mapping[str, Any] = {
    "source": "builtin:tiny", "calibrate": {"images": 8},
    "shapes": {"batch": [1, 1, 2], "height": [64, 64, 96], "width": [64, 64, 96]},
    "defaults": {"num_inference_steps": _STEPS, "guidance_scale": 3.0},
}  # fmt: skip


def selftest(store: Store, output: Path, observer: Observer, source: str | None = None) -> dict[str, Any]:
    """Build, verify and time the tiny model, and the model `source` if one is named; the report goes to `output`.

    Raises VerifyError, after the report is written, when a backend that is present did not pass.
    """
    found = driver.look()
    report: dict[str, Any] = {
        "sdcompile": __version__,
        "written_at": "",
        "machine": {**machine.identity(), "system": platform.platform(), "python": platform.python_version()},
        "gpus": [vars(device) for device in found.devices],
        "driver": found.version or found.reason,
        "packages": {name: version for name in _PACKAGES if (version := machine.installed(name))},
        "backends": {},
        "full": None,
    }

    def keep() -> None:
        report["written_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    _fill(report["backends"], NVIDIA, _TINY, "selftest", store, output.parent, observer, keep)
    if source is not None:
        report["full"] = {"source": source, "backends": {}, "bench": {"absent": {}}}
        rows = report["full"]["backends"]
        _fill(rows, FULL, _full(source), "selftest-full", store, output.parent, observer, keep)
        bundles = [
            output.parent / f"selftest-full-{name}.sdc" for name, row in rows.items() if row["state"] == "passed"
        ]
        report["full"]["bench"] = _raced(bundles, source)
    keep()
    rows = dict(report["backends"])
    rows |= {f"{name}, full size": row for name, row in (report["full"] or {"backends": {}})["backends"].items()}
    failed = [f"{name}: {row['error']}" for name, row in rows.items() if row["state"] == "failed"]
    if failed:
        raise VerifyError("\n".join(failed), f"the whole story is in {output}: please send it")
    return report


def _full(source: str) -> dict[str, Any]:
    """SD 1.5 as it is used. Its verification runs torch in fp32 on the CPU: one prompt and few steps are enough."""
    return {
        "source": source, "shapes": {"batch": 1},
        "defaults": {"num_inference_steps": _STEPS, "guidance_scale": 7.5},
        "verify": {"prompts": [_PROMPT], "num_inference_steps": 3, "on_nan": "fallback"},
    }  # fmt: skip


def _fill(
    rows: dict[str, Any], ways: Iterable[str], model: Mapping[str, Any], prefix: str, store: Store, folder: Path,
    observer: Observer, keep: Callable[[], None],
) -> None:  # fmt: skip
    """One row of the report per way; the one in progress says so, in case it takes the process down."""
    for name in ways:
        rows[name] = {"state": "failed", "error": "did not come back: the process ended while it was at it"}
        keep()
        rows[name] = _row(NVIDIA[name], {**model, "name": f"{prefix}-{name}"}, store, folder, observer)
        keep()


def _row(way: Way, model: Mapping[str, Any], store: Store, folder: Path, observer: Observer) -> dict[str, Any]:
    """What became of one way: absent, failed, built (but not run) or passed; with figures."""
    probe = BACKENDS[way.backend].probe()
    if not probe.available:
        return {"state": "absent", "error": f"{probe.reason} ({probe.hint})"}
    if way.build.get("provider", "") not in ("", *probe.devices):
        why = probe.missing.get(way.build["provider"], "it is not installed")
        return {"state": "absent", "error": f"provider {way.build['provider']}: {why}"}
    began = time.monotonic()
    try:
        recipe = Recipe.model_validate(
            {
                "version": 1, "family": "sd", "backend": way.backend, "precision": way.precision,
                "build": dict(way.build), "samplers": ["dpmpp_2m"], "sampler_steps": [1, _STEPS], **model,
            },
            context=known_names(),
        )  # fmt: skip
        work = run.lay_out(recipe, Path.cwd(), store, offline=recipe.source.startswith("builtin:"))
        with observer.watching(work.plan):
            paths = run.build(work, "package", observer)
        placed = run.place(work, paths["pipeline.package.bundle"], folder)
        reports = status.outcome(work, paths, placed)["reports"]
        unrun = any(report.get("stand_in") for report in reports.values())
        timings = None if unrun else _timed(placed)
        wrong = timings is not None and not timings["latents"]["as_on_host"]
        return {
            "state": "failed" if wrong else "built" if unrun else "passed",
            **({"error": "latents that stay on the device are not those of the host's loop"} if wrong else {}),
            "version": probe.version,
            "seconds": round(time.monotonic() - began, 1),
            "not_run": probe.cannot_run or None,
            "fallbacks": dict(work.fallbacks),
            "reports": {
                component: {
                    key: report.get(key) for key in ("worst", "floor", "facts", "stand_in", "proof", "sweep", "ranges")
                }
                for component, report in reports.items()
            },
            "timings": timings,
        }
    except SdcompileError as error:
        return {"state": "failed", "version": probe.version, "error": str(error)}
    # This is what the report is for: a fault of ours that shows on a GPU alone, with all there is to find it by.
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        return {"state": "failed", "version": probe.version, "error": told, "traceback": traceback.format_exc()}


def _raced(bundles: list[Path], source: str) -> dict[str, Any]:
    """The bundles that ran, timed in turns with torch on the GPU; `absent` says who could not take part, and why."""
    from sdcompile.errors import HostError
    from sdcompile.measure import bench, contenders, sources

    if not bundles:
        return {"absent": {"bundles": "no full-size engine ran here, so there is nothing to time"}}
    absent, peers = {}, []
    for name in PEERS:
        try:
            contenders.python_of(name)
            peers.append(name)
        except HostError as error:
            absent[name] = error.message
    settings = bench.Settings(processes=2, images=5, alone=True)
    while True:
        try:
            model = sources.folders(bundles[0], (source,)) if peers else {}
            return {**bench.bench(bundles, peers, model=model, settings=settings), "absent": absent}
        except SdcompileError as error:
            culprit = next((name for name in peers if str(error).startswith(f"{name} failed")), None)
            absent[culprit or "bundles"] = str(error)
            if culprit is None:
                return {"absent": absent}
            # What the others give is worth having.
            peers.remove(culprit)


def _timed(bundle: Path) -> dict[str, Any]:
    """Seconds of images after the first, which makes kernels and graphs; milliseconds of the denoiser's calls; and
    whether latents that stay on the GPU between steps are those of the host's loop, bit for bit."""
    from sdcompile import load

    with load(bundle) as pipeline:
        outputs = []
        for seed in range(1 + _IMAGES):
            began = time.perf_counter()
            timings = pipeline(_PROMPT, seed=seed, num_inference_steps=_STEPS, output_type="np").timings
            outputs.append((time.perf_counter() - began, timings["denoise_s"]))

        def drawn(**look: Any) -> Any:
            return pipeline(_PROMPT, seed=0, num_inference_steps=_STEPS, output_type="latent", **look)

        there, here = drawn(), drawn(callback_on_step_end=lambda *_: None)
        latents = {"on_device": there.timings["on_device"][0], "as_on_host": bool((there.images == here.images).all())}
    calls = sorted(1e3 * seconds for _, denoise in outputs[1:] for seconds in denoise)
    return {
        "latents": latents,
        "first_image_s": round(outputs[0][0], 4),
        "image_s": [round(seconds, 4) for seconds, _ in outputs[1:]],
        "denoiser_call_ms": {"median": round(calls[len(calls) // 2], 3), "worst": round(calls[-1], 3)},
    }
