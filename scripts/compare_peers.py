"""Measure a bundle against other ways to run the same weights, on this machine.

    python scripts/compare_peers.py models/sd15 --bundle artifacts/sd15-openvino-bf16.sdc
    python scripts/compare_peers.py models/sd15 --recipe recipes/sd15-openvino-bf16.yaml --set source=models/sd15
    python scripts/compare_peers.py sdcompile/models/tiny --contenders diffusers-fp32 --size 64x64 --rounds 1

What is fair here: every contender is a process of its own, with the same threads, prompt,
initial latents, sampler, steps and guidance; rounds alternate (A B C, A B C, ...) so that a slow
moment of the machine hits all; the first image of each process is kept apart, since it opens and
warms things up. optimum-intel runs in an environment of its own under --venv, made on first use,
because it needs older libraries. Pictures are compared with those of diffusers in fp32: a fast
contender that draws something else has not won.

--bundle measures a bundle that is there; --recipe also builds it, in an empty store, and times
that. Figures go to a Markdown table and, with --output, to JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where the worker is, also when a test imports this
from peer_worker import LOADERS, REFERENCE, SCHEDULERS

PROMPT = "a photograph of an old lighthouse on a cliff at sunset, waves breaking below"
PEERS = ["torch==2.13.0", "optimum-intel[openvino]", "diffusers", "transformers"]
GIB = 1 << 30
WORKER = Path(__file__).resolve().with_name("peer_worker.py")


class Watched:
    """One child process, its wall seconds, peak resident bytes and peak anonymous bytes.

    Resident counts mapped weight files, which the kernel can drop; anonymous is what must be held.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        started = time.perf_counter()
        self.peak_bytes = self.anonymous_bytes = 0
        with log.open("ab") as file:
            child = subprocess.Popen(command, env={**os.environ, **environment}, stdout=file, stderr=file)
            watcher = threading.Thread(target=self._watch, args=(child,))
            watcher.start()
            code = child.wait()
            watcher.join()
        self.seconds = time.perf_counter() - started
        if code:
            tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            sys.exit(f"{' '.join(map(str, command[:4]))} ... failed with exit code {code}; the end of {log}:\n{tail}")

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        status = Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            try:
                rows = dict(row.split(":", 1) for row in status.read_text(encoding="ascii").splitlines() if ":" in row)
            except OSError:
                return
            if "VmHWM" in rows:  # absent once the process is a zombie
                self.peak_bytes = max(self.peak_bytes, int(rows["VmHWM"].split()[0]) * 1024)
                self.anonymous_bytes = max(self.anonymous_bytes, int(rows["RssAnon"].split()[0]) * 1024)
            time.sleep(0.02)


def python_of_peers(folder: Path, log: Path) -> Path:
    """The interpreter of optimum-intel's own environment, which is made when it is not there."""
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        # torch first and by exact version, or the resolver may take a CUDA build of several gigabytes.
        for packages in (PEERS[:1], PEERS):
            Watched([str(python), "-m", "pip", "install", "--quiet", *packages], {}, log)
        # It comes along, is built against the CUDA torch, breaks imports beside the CPU one, and nothing here uses it.
        Watched([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], {}, log)
        ready.touch()
    return python


def build(options: argparse.Namespace, folder: Path, log: Path) -> tuple[Path, Watched]:
    """Build --recipe in an empty store; returns the bundle and what building took."""
    command = [
        sys.executable, "-m", "sdcompile", "build", str(options.recipe),
        "--store", str(folder / "store"), "--output", str(folder / "built"),
    ]  # fmt: skip
    for assignment in options.set:
        command += ["--set", assignment]
    watched = Watched(command, {}, log)
    (bundle,) = (folder / "built").glob("*.sdc")
    return bundle, watched


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run everything; returns the figures as JSON-able data."""
    log, host = folder / "workers.log", machine(options.threads)
    height, width = options.size
    bundle, costs, job = options.bundle, {}, _job(options, folder)
    if options.recipe:
        bundle, costs["sdcompile"] = build(options, folder, log)
        costs["sdcompile-low"] = costs["sdcompile"]
    factor = _vae_factor(options.source)
    latents = np.random.default_rng(options.seed).standard_normal((1, 4, height // factor, width // factor))
    np.save(job["latents"], latents.astype(np.float32))
    peers = [name for name in options.contenders if name.startswith("optimum")]
    python = python_of_peers(options.venv, log) if peers else None
    if peers:
        exported = {**job, "contender": "optimum-export"}
        costs["optimum-intel"] = costs["optimum-intel-static"] = _spawn(exported, python, folder, log, options)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
    for number in range(options.rounds):
        for name in options.contenders:
            sys.stderr.write(f"round {number + 1}/{options.rounds}: {name}\n")
            mine = {**job, "contender": name, "bundle": str(bundle), "picture": str(folder / f"{name}.npy")}
            watched = _spawn(mine, python if name in peers else None, folder, log, options)
            result = json.loads(Path(job["result"]).read_text(encoding="utf-8"))
            rows[name].append({**result, "peak_bytes": watched.peak_bytes, "anonymous_bytes": watched.anonymous_bytes})
    return {
        "machine": host, "source": options.source.name, "size": f"{width}x{height}",
        "steps": options.steps, "guidance_scale": options.guidance_scale, "sampler": options.sampler,
        "rounds": options.rounds, "images_per_round": options.images,
        "contenders": {name: summary(name, runs, costs.get(name), folder) for name, runs in rows.items()},
    }  # fmt: skip


def _job(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    height, width = options.size
    call = {
        "prompt": options.prompt, "negative_prompt": "", "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale, "height": height, "width": width,
    }  # fmt: skip
    return {
        "source": str(options.source.resolve()), "exported": str(folder / "exported"), "call": call,
        "sampler": options.sampler, "threads": options.threads, "images": options.images,
        "latents": str(folder / "latents.npy"), "result": str(folder / "result.json"), "cache": str(folder / "cache"),
    }  # fmt: skip


def _spawn(
    job: Mapping[str, Any], python: Path | None, folder: Path, log: Path, options: argparse.Namespace
) -> Watched:
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    environment = {
        # A spinning thread steals from the others of a small machine; the same for every contender.
        "OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    return Watched([str(python or sys.executable), str(WORKER), str(path)], environment, log)


def _vae_factor(source: Path) -> int:
    config = json.loads((source / "vae" / "config.json").read_text(encoding="utf-8"))
    return 2 ** (len(config["block_out_channels"]) - 1)


def summary(name: str, runs: list[dict[str, Any]], cost: Watched | None, folder: Path) -> dict[str, Any]:
    """Medians over rounds; memory is the worst of them."""

    def median(key: str) -> float:
        values = [value for run in runs for value in (run[key] if isinstance(run[key], list) else [run[key]])]
        return round(statistics.median(values), 4) if values else float("nan")

    reference = folder / f"{REFERENCE}.npy"
    return {
        "what": runs[0]["what"],
        **{key: median(key) for key in ("load_s", "first_image_s", "image_s", "step_s", "cpu_s")},
        "image_s_all": [round(value, 3) for run in runs for value in run["image_s"]],
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "anonymous_bytes": max(run["anonymous_bytes"] for run in runs),
        "build_s": round(cost.seconds, 1) if cost else None,
        "build_peak_bytes": cost.peak_bytes if cost else None,
        "psnr_db": psnr_db(folder / f"{name}.npy", reference) if reference.exists() else None,
    }


def psnr_db(picture: Path, reference: Path) -> float | None:
    """Peak signal-to-noise ratio of two pictures in [0, 1]; None where they are equal or differ in shape."""
    a, b = np.load(picture).astype(np.float64), np.load(reference).astype(np.float64)
    error = float(np.mean((a - b) ** 2)) if a.shape == b.shape else float("nan")
    return round(-10 * float(np.log10(error)), 1) if error > 0 else None


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    from sdcompile.machine import cpu_features, cpu_model, memory_bytes

    return {
        "cpu": cpu_model(), "features": list(cpu_features()), "cores": os.cpu_count(), "threads": threads,
        "memory_gib": round(memory_bytes()[0] / GIB, 1), "system": platform.platform(terse=True),
        "python": platform.python_version(), "load_average": [round(value, 1) for value in os.getloadavg()],
    }  # fmt: skip


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a table for people, with ratios to the bundle (above 1: the bundle is faster)."""
    rows, host = report["contenders"], report["machine"]
    ours = rows.get("sdcompile", {}).get("image_s")
    lines = [
        f"{host['cpu']}, {host['threads']} threads ({', '.join(host['features'])}), {host['memory_gib']} GiB; "
        f"{report['source']}, {report['size']}, {report['steps']} steps of {report['sampler']}, "
        f"guidance {report['guidance_scale']}; medians of {report['rounds']} alternated rounds",
        "",
        "| | s / image | x sdcompile | s / step | CPU s / image | load s | first image s | peak GiB (anonymous) "
        "| build s | build peak GiB | PSNR dB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [
            name, f"{row['image_s']:.2f}", f"{row['image_s'] / ours:.2f}" if ours else "-", f"{row['step_s']:.3f}",
            f"{row['cpu_s']:.2f}", f"{row['load_s']:.1f}", f"{row['first_image_s']:.1f}",
            f"{row['peak_bytes'] / GIB:.2f} ({row['anonymous_bytes'] / GIB:.2f})",
            "-" if row["build_s"] is None else f"{row['build_s']:.0f}",
            "-" if row["build_peak_bytes"] is None else f"{row['build_peak_bytes'] / GIB:.1f}",
            "-" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {row['what']}" for name, row in rows.items())]
    return "\n".join(lines) + "\n"


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"'{text}': expected WIDTHxHEIGHT, as in 512x512")
    return int(height), int(width)


def _contenders(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in LOADERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(LOADERS)}")
    return names


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="diffusers folder that every contender runs")
    made = parser.add_mutually_exclusive_group()
    made.add_argument("--bundle", type=Path, help="a bundle built from it")
    made.add_argument("--recipe", type=Path, help="build this recipe first, in an empty store, and time it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to sdcompile build")
    parser.add_argument("--contenders", type=_contenders, default=list(LOADERS), help=f"of {','.join(LOADERS)}")
    parser.add_argument("--size", type=_size, default=(512, 512), metavar="WxH")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--sampler", choices=sorted(SCHEDULERS), default="ddim")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1, help="images that count, per process, after the first")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--venv", type=Path, default=Path("artifacts/peers-venv"), help="optimum-intel's own environment"
    )
    parser.add_argument("--work", type=Path, help="keep logs, pictures and exports here, instead of a temporary folder")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args(words)
    if any(name.startswith("sdcompile") for name in options.contenders) and not (options.bundle or options.recipe):
        parser.error("name the bundle with --bundle, or a recipe with --recipe, or leave sdcompile out of --contenders")
    if not (options.source / "model_index.json").is_file():
        parser.error(f"{options.source} is not a diffusers folder")
    return options


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="compare-peers-") as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = compare(options, folder)
    sys.stdout.write(markdown(report))
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
