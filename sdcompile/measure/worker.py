"""One contender in a process of its own: load, make images when told, say how long they took.

    python -P worker.py     reads JSON lines from stdin, answers with JSON lines on stdout

The first line is the job, the others are orders. Everything but numpy is imported where it is
needed: a peer's interpreter may hold nothing of this project, so this file is run by its path
(-P keeps its folder off the import path).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

Job = Mapping[str, Any]
Made = tuple[np.ndarray, dict[str, float]]
Draw = Callable[[str, np.ndarray, Callable[..., Any]], Made]
"""(prompt, unit noise (N, C, h, w), step callback) -> images (N, H, W, 3) in [0, 1], seconds by component."""


def _bundle(job: Job) -> tuple[Draw, str]:
    import sdcompile

    pipe = sdcompile.load(job["bundle"], threads=job["threads"], memory=job["memory"], target=job["target"])

    def draw(prompt: str, latents: np.ndarray, callback: Callable[..., Any]) -> Made:
        output = pipe(
            prompt, **job["call"], sampler=job["sampler"], num_images_per_prompt=len(latents), latents=latents,
            output_type="np", watch=callback,
        )  # fmt: skip
        told = output.timings
        parts = {name: float(told[name]) for name in ("text_encoder_s", "vae_s", "open_s")}
        parts |= {"denoise_s": float(sum(told["denoise_s"])), "call_s": float(np.mean(told["denoise_s"]))}
        return np.asarray(output.images), parts

    return draw, f"sdcompile {sdcompile.__version__}"


def _diffusers(job: Job) -> tuple[Draw, str]:
    import diffusers
    import torch

    torch.set_num_threads(job["threads"])
    name = job["kind"]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name.rpartition("-")[2], torch.float32)
    half = dtype != torch.float32
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        job["source"], dtype=dtype, safety_checker=None, local_files_only=True
    )
    if job.get("decoder"):
        kind = getattr(diffusers, diffusers.AutoencoderKL.load_config(job["decoder"])["_class_name"])
        pipe.vae = kind.from_pretrained(job["decoder"], dtype=dtype, local_files_only=True)
    if half:
        # A config may state the text encoder's own dtype, which from_pretrained prefers to ours.
        pipe.to(dtype)
        for module in (pipe.unet, pipe.vae):
            module.to(memory_format=torch.channels_last)
    if "-cuda-" in name:
        pipe.to("cuda")
    if name.startswith("torch-compile"):
        pipe.unet = torch.compile(pipe.unet)
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    return _diffusers_draw(pipe, job, dtype), f"diffusers {diffusers.__version__}, torch {torch.__version__}, {dtype}"


def _diffusers_draw(pipe: Any, job: Job, dtype: Any) -> Draw:
    """How the pipelines of diffusers and optimum are called, which is alike."""
    import diffusers
    import torch

    scheduler = getattr(diffusers, job["scheduler"])
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **job["scheduler_config"])
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt: str, latents: np.ndarray, callback: Callable[..., Any]) -> Made:
        def ended(*told: Any) -> Any:
            if pipe.device.type == "cuda":
                # Kernels are only queued: without this a step would seem to end when it begins.
                torch.cuda.synchronize()
            return callback(*told)

        with torch.no_grad():
            images = pipe(
                prompt, **job["call"], num_images_per_prompt=len(latents), latents=torch.from_numpy(latents).to(dtype),
                output_type="np", callback_on_step_end=ended,
            ).images  # fmt: skip
        return np.asarray(images, dtype=np.float32), {}

    return draw


def _optimum_intel(job: Job) -> tuple[Draw, str]:
    from importlib.metadata import version

    import torch
    from optimum.intel import OVStableDiffusionPipeline

    config = {"INFERENCE_NUM_THREADS": str(job["threads"]), "PERFORMANCE_HINT": "LATENCY"}
    pipe = OVStableDiffusionPipeline.from_pretrained(
        job["exported"], compile=False, safety_checker=None, ov_config=config, local_files_only=True
    )
    static = job["kind"].endswith("-static")
    if static:
        call = job["call"]
        pipe.reshape(batch_size=1, height=call["height"], width=call["width"], num_images_per_prompt=1)
    pipe.compile()
    shapes = "static" if static else "dynamic"
    what = f"optimum-intel {version('optimum-intel')}, openvino {version('openvino')}, {shapes} shapes"
    return _diffusers_draw(pipe, job, torch.float32), what


def _optimum_onnx(job: Job) -> tuple[Draw, str]:
    from importlib.metadata import version

    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = job["threads"]
    pipe = ORTStableDiffusionPipeline.from_pretrained(
        job["exported"], session_options=settings, safety_checker=None, local_files_only=True
    )
    what = f"optimum-onnx {version('optimum-onnx')}, onnxruntime {version('onnxruntime')}"
    return _diffusers_draw(pipe, job, torch.float32), what


def _export(job: Job) -> None:
    """Once, before a peer that runs an export of its own is timed."""
    if job["kind"] == "optimum-onnx":
        from optimum.onnxruntime import ORTStableDiffusionPipeline as Pipeline

        options = {}
    else:
        from optimum.intel import OVStableDiffusionPipeline as Pipeline

        options = {"compile": False, "load_in_8bit": False}
    Pipeline.from_pretrained(job["source"], export=True, local_files_only=True, **options).save_pretrained(
        job["exported"]
    )


LOADERS: dict[str, Callable[[Job], tuple[Draw, str]]] = {
    "bundle": _bundle,
    "diffusers-fp32": _diffusers,
    "diffusers-bf16": _diffusers,
    "diffusers-cuda-fp16": _diffusers,
    "torch-compile": _diffusers,
    "torch-compile-cuda-fp16": _diffusers,
    "torch-compile-bf16": _diffusers,
    "optimum-intel": _optimum_intel,
    "optimum-intel-static": _optimum_intel,
    "optimum-onnx": _optimum_onnx,
}


def image(draw: Draw, order: Job) -> dict[str, Any]:
    """Make one batch. `steps` are the seconds between ends of denoising steps, so one fewer than steps."""
    ends: list[float] = []

    def callback(*told: Any) -> Any:
        ends.append(time.perf_counter())
        return told[-1]

    latents = np.load(order["latents"])
    busy, started = _cpu_s(), time.perf_counter()
    images, parts = draw(order["prompt"], latents, callback)
    seconds, cpu = time.perf_counter() - started, _cpu_s() - busy
    if order.get("save"):
        np.save(order["save"], images)
    steps = [after - before for before, after in pairwise(ends)]
    return {"image_s": seconds, "cpu_s": cpu, "step_s": steps, "parts": parts}


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    # Libraries print to stdout; answers go through a copy of it that only this file knows.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**facts: Any) -> None:
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    try:
        job = json.loads(sys.stdin.readline())
        if job.get("export"):
            _export(job)
            answer(exported=True)
            return
        started = time.perf_counter()
        draw, what = LOADERS[job["kind"]](job)
        answer(load_s=time.perf_counter() - started, what=what)
        for line in sys.stdin:
            answer(**image(draw, json.loads(line)))
    # Whatever it is, the other side shows it: a contender that fails must not look like a slow one.
    except Exception as error:
        # A fault of ours explains itself and goes on as it is; of anything else the traceback says where it came up.
        ours = type(error).__module__ == "sdcompile.errors"
        fault = [type(error).__name__, error.message, error.hint] if ours else None  # type: ignore[attr-defined]
        answer(error=f"{type(error).__name__}: {error}".strip(), fault=fault, traceback=traceback.format_exc())
        sys.exit(1)


if __name__ == "__main__":
    main()
