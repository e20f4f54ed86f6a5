"""One contender of compare_peers.py, in a process of its own: load, make images, write figures.

    python scripts/peer_worker.py JOB.json

It runs under the interpreter of the contender it measures, so everything but numpy is imported
where it is needed.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

SCHEDULERS = {
    "ddim": "DDIMScheduler", "pndm": "PNDMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler", "unipc": "UniPCMultistepScheduler", "lcm": "LCMScheduler",
}  # fmt: skip
REFERENCE = "diffusers-fp32"

Run = Callable[[np.ndarray, Callable[..., Any]], np.ndarray]
"""(initial latents, step callback) -> images (N, H, W, 3) in [0, 1]."""


def _sdcompile(job: Mapping[str, Any]) -> tuple[Run, str]:
    import sdcompile

    memory = "low" if job["contender"].endswith("-low") else "auto"
    pipe = sdcompile.load(job["bundle"], threads=job["threads"], cache=job.get("cache"), memory=memory)
    arguments = {name: value for name, value in job["call"].items() if name != "output_type"}

    def run(latents: np.ndarray, callback: Callable[..., Any]) -> np.ndarray:
        output = pipe(
            **arguments, latents=latents, sampler=job["sampler"], output_type="np", callback_on_step_end=callback
        )
        return np.asarray(output.images)

    return run, f"sdcompile {sdcompile.__version__}, memory={memory}"


def _diffusers(job: Mapping[str, Any]) -> tuple[Run, str]:
    import diffusers
    import torch

    torch.set_num_threads(job["threads"])
    half = job["contender"].endswith("bf16")
    dtype = torch.bfloat16 if half else torch.float32
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        job["source"], torch_dtype=dtype, safety_checker=None, local_files_only=True
    )
    if half:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    return _diffusers_run(pipe, job, dtype), f"diffusers {diffusers.__version__}, torch {torch.__version__}, {dtype}"


def _diffusers_run(pipe: Any, job: Mapping[str, Any], dtype: Any) -> Run:
    """How diffusers' and optimum's pipelines are called alike."""
    import diffusers
    import torch

    pipe.scheduler = getattr(diffusers, SCHEDULERS[job["sampler"]]).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def run(latents: np.ndarray, callback: Callable[..., Any]) -> np.ndarray:
        with torch.no_grad():
            start = torch.from_numpy(latents).to(dtype)
            images = pipe(**job["call"], latents=start, output_type="np", callback_on_step_end=callback).images
        return np.asarray(images, dtype=np.float32)

    return run


def _optimum(job: Mapping[str, Any]) -> tuple[Run, str]:
    from importlib.metadata import version

    import torch
    from optimum.intel import OVStableDiffusionPipeline

    config = {"INFERENCE_NUM_THREADS": str(job["threads"]), "PERFORMANCE_HINT": "LATENCY"}
    pipe = OVStableDiffusionPipeline.from_pretrained(
        job["exported"], compile=False, safety_checker=None, ov_config=config, local_files_only=True
    )
    static = job["contender"].endswith("-static")
    if static:
        call = job["call"]
        pipe.reshape(batch_size=1, height=call["height"], width=call["width"], num_images_per_prompt=1)
    pipe.compile()
    shapes = "static" if static else "dynamic"
    what = f"optimum-intel {version('optimum-intel')}, openvino {version('openvino')}, {shapes} shapes"
    return _diffusers_run(pipe, job, torch.float32), what


def _optimum_export(job: Mapping[str, Any]) -> None:
    from optimum.intel import OVStableDiffusionPipeline

    pipe = OVStableDiffusionPipeline.from_pretrained(
        job["source"], export=True, compile=False, load_in_8bit=False, local_files_only=True
    )
    pipe.save_pretrained(job["exported"])


LOADERS: dict[str, Callable[[Mapping[str, Any]], tuple[Run, str]]] = {
    "sdcompile": _sdcompile,
    "sdcompile-low": _sdcompile,
    REFERENCE: _diffusers,
    "diffusers-bf16": _diffusers,
    "optimum-intel": _optimum,
    "optimum-intel-static": _optimum,
}


def work(job: Mapping[str, Any]) -> None:
    """Load, make a first image, then the images that count; write figures and the last picture."""
    if job["contender"] == "optimum-export":
        _optimum_export(job)
        return
    started = time.perf_counter()
    run, what = LOADERS[job["contender"]](job)
    load_s = time.perf_counter() - started
    latents, steps, images, cpu = np.load(job["latents"]), [], [], []
    first_s, picture = 0.0, None
    for index in range(1 + job["images"]):
        ends: list[float] = []

        def callback(*told: Any, ends: list[float] = ends) -> Any:
            ends.append(time.perf_counter())
            return told[-1]

        busy, started = _cpu_s(), time.perf_counter()
        picture = run(latents, callback)
        took = time.perf_counter() - started
        if index == 0:
            first_s = took
            continue
        images.append(took)
        cpu.append(_cpu_s() - busy)
        steps += [after - before for before, after in pairwise(ends)]
    np.save(job["picture"], picture)
    result = {
        "what": what, "load_s": load_s, "first_image_s": first_s, "image_s": images, "step_s": steps, "cpu_s": cpu,
    }  # fmt: skip
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
