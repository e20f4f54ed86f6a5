"""What the owner of a GPU runs once: the tiny model through every NVIDIA backend, and one report to send back.

Where there is no GPU it still builds what can be built and says what was not run. It knows which
backends are NVIDIA's and nothing of how they work.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile import __version__, machine, run, status
from sdcompile.backends import BACKENDS
from sdcompile.backends.trt import driver
from sdcompile.errors import SdcompileError, VerifyError
from sdcompile.recipe import Recipe, known_names

if TYPE_CHECKING:
    from sdcompile.console import Observer
    from sdcompile.store import Store

NVIDIA: Mapping[str, Mapping[str, Any]] = {"tensorrt_rtx": {}, "tensorrt": {}, "onnxruntime": {"provider": "cuda"}}
"""Backends that compute on NVIDIA GPUs, and the build options that make them."""

_PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13",
             "tensorrt", "cuda-bindings")  # fmt: skip
_PROMPT, _STEPS, _IMAGES = "a large green star on a white background", 20, 3


def selftest(store: Store, output: Path, observer: Observer) -> dict[str, Any]:
    """Build, verify and time the tiny model with every NVIDIA backend; writes the report to the file `output`.

    Raises VerifyError, after the report is written, when a backend that is present did not pass.
    """
    found = driver.look()
    rows = {name: _row(name, options, store, output.parent, observer) for name, options in NVIDIA.items()}
    report = {
        "sdcompile": __version__,
        "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {**machine.identity(), "system": platform.platform(), "python": platform.python_version()},
        "gpus": [vars(device) for device in found.devices],
        "driver": found.version or found.reason,
        "packages": {name: version for name in _PACKAGES if (version := machine.version(name))},
        "backends": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    failed = [f"{name}: {row['error']}" for name, row in rows.items() if row["state"] == "failed"]
    if failed:
        raise VerifyError("\n".join(failed), f"the whole story is in {output}: please send it")
    return report


def _row(name: str, options: Mapping[str, Any], store: Store, folder: Path, observer: Observer) -> dict[str, Any]:
    """What became of one backend: absent, failed, built (but not run) or passed; with figures."""
    probe = BACKENDS[name].probe()
    if not probe.available:
        return {"state": "absent", "error": f"{probe.reason} ({probe.hint})"}
    if options.get("provider", "") not in ("", *probe.devices):
        return {"state": "absent", "error": f"{name} here has no {options['provider']}"}
    began = time.monotonic()
    try:
        recipe = Recipe.model_validate(
            {
                "version": 1, "name": f"selftest-{name}", "family": "sd", "source": "builtin:tiny", "backend": name,
                "precision": "fp16", "build": dict(options), "samplers": ["dpmpp_2m"], "sampler_steps": [1, _STEPS],
                "shapes": {"batch": [1, 1, 2], "height": [64, 64, 96], "width": [64, 64, 96]},
                "defaults": {"num_inference_steps": _STEPS, "guidance_scale": 3.0},
            },
            context=known_names(),
        )  # fmt: skip
        work = run.lay_out(recipe, Path.cwd(), store, offline=True)
        with observer.watching(work.plan):
            paths = run.build(work, "package", observer)
        placed = run.place(work, paths["pipeline.package.bundle"], folder)
        reports = status.outcome(work, paths, placed)["reports"]
        unrun = any(report.get("stand_in") for report in reports.values())
        return {
            "state": "built" if unrun else "passed",
            "version": probe.version,
            "seconds": round(time.monotonic() - began, 1),
            "not_run": probe.cannot_run or None,
            "reports": {
                component: {key: report.get(key) for key in ("worst", "floor", "facts", "stand_in", "proof")}
                for component, report in reports.items()
            },
            "timings": None if unrun else _timed(placed),
        }
    except SdcompileError as error:
        return {"state": "failed", "version": probe.version, "error": str(error)}


def _timed(bundle: Path) -> dict[str, Any]:
    """Seconds of images after the first, which makes kernels and graphs; milliseconds of the denoiser's calls."""
    from sdcompile import load

    with load(bundle) as pipeline:
        outputs = []
        for seed in range(1 + _IMAGES):
            began = time.perf_counter()
            timings = pipeline(_PROMPT, seed=seed, num_inference_steps=_STEPS, output_type="np").timings
            outputs.append((time.perf_counter() - began, timings["denoise_s"]))
    calls = sorted(1e3 * seconds for _, denoise in outputs[1:] for seconds in denoise)
    return {
        "first_image_s": round(outputs[0][0], 4),
        "image_s": [round(seconds, 4) for seconds, _ in outputs[1:]],
        "denoiser_call_ms": {"median": round(calls[len(calls) // 2], 3), "worst": round(calls[-1], 3)},
    }
