"""One recorded call of a component as Polygraphy files, and the commands that repeat and bisect it.

    DIR/<component>/inputs.json      feeds, for --load-inputs
    DIR/<component>/reference.json   what torch answered in fp32, for --load-outputs
    DIR/<component>/engine.json      what the engine answered, where that was kept
    DIR/<component>/typed/           the ONNX the engine was built from
    DIR/<component>/exported/        the fp32 ONNX as it was exported
    DIR/<component>/commands.sh      compare; where they differ, write every value of the fp32 graph, and find the first
                                     node that leaves it
    DIR/<component>/polygraphy.log   what those commands said, where sdcompile ran them (`run`)

Polygraphy (Apache-2.0) is NVIDIA's tool; nothing but this file needs it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile.errors import HostError
from sdcompile.files import link

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

_RUNNERS = {"tensorrt": ("--trt", "--strongly-typed"), "tensorrt_rtx": ("--trt",)}
"""TensorRT 10 must be told that the graph's types hold; 11 takes the flag and needs none."""
_PROVIDERS = {"cuda": ("cuda", "cpu"), "tensorrt": ("tensorrt", "cuda", "cpu")}
_ENVIRONMENT = {"tensorrt_rtx": "POLYGRAPHY_USE_TENSORRT_RTX=1 "}


def write(
    folder: Path,
    backend: str,
    forms: Mapping[str, Path],
    feeds: Arrays,
    reference: Arrays,
    engine: Arrays | None,
    floor_db: float,
    provider: str = "cpu",
) -> list[str]:
    """Write the files into `folder`; returns the commands of commands.sh.

    forms: "typed" and "exported" -> a folder with model.onnx; provider: that of ONNX Runtime which runs the engine.
    Raises HostError when polygraphy is missing.
    """
    try:
        from polygraphy.comparator import IterationResult, RunResults
        from polygraphy.json import save_json
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise HostError(f"polygraphy is not installed ({error})", "pip install 'sdcompile[polygraphy]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    answers = {"reference": ("torch-fp32", reference), "engine": (f"sdcompile-{backend}", engine)}
    # Its logger writes to stdout, where results and JSON events go.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        save_json([dict(feeds)], str(folder / "inputs.json"))
        for name, (runner, arrays) in answers.items():
            if arrays is not None:
                results = RunResults()
                results.add([IterationResult(dict(arrays), runner_name=runner)], runner_name=runner)
                results.save(str(folder / f"{name}.json"))
    for name, source in forms.items():
        for path in sorted(source.glob("model.onnx*")):
            (folder / name / path.name).unlink(missing_ok=True)
            link(path, folder / name / path.name)
    shapes = {name: array.shape for name, array in feeds.items()}
    lines = [
        _ENVIRONMENT.get(backend, "") + shlex.join(compare(backend, shapes, floor_db, provider)),
        shlex.join(every_value()),
        _ENVIRONMENT.get(backend, "") + shlex.join(bisect(backend, shapes, floor_db, provider)),
    ]
    agrees, *search = lines
    script = ["set -x", 'cd "$(dirname "$0")"', f"{agrees} && exit 0", "set -e", *search, "exit 1", ""]
    (folder / "commands.sh").write_text("\n".join(script), encoding="utf-8")
    return lines


def run(folder: Path) -> dict[str, Any]:
    """Run commands.sh of `folder`: {"agrees", "first_node", "log"}.

    first_node: where the typed graph leaves the fp32 one, None where it does not; "" where the search failed, of which
    the log tells more.
    """
    import onnx

    found, log = folder / "reduced.onnx", folder / "polygraphy.log"
    found.unlink(missing_ok=True)
    # Polygraphy is called by its name, by itself too: that of this environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with log.open("wb") as file:
        done = subprocess.run(
            ["sh", str(folder / "commands.sh")], stdout=file, stderr=file, env={**os.environ, "PATH": path}, check=False
        )
    agrees = done.returncode == 0
    first = None if agrees else ""
    if found.is_file():
        first = onnx.load(found, load_external_data=False).graph.node[-1].name
    return {"agrees": agrees, "first_node": first, "log": str(log)}


def compare(backend: str, shapes: Mapping[str, Sequence[int]], floor_db: float, provider: str = "cpu") -> list[str]:
    """Does the typed graph, run by the backend's library, agree with what torch answered?"""
    return [
        *_run("typed/model.onnx", backend, shapes, provider),
        "--load-outputs",
        "reference.json",
        *_judged(floor_db),
    ]


def every_value() -> list[str]:
    """Write every value of the fp32 graph, as onnxruntime computes it, to values.json."""
    return [
        "polygraphy", "run", "exported/model.onnx", "--onnxrt", "--onnx-outputs", "mark", "all",
        "--load-inputs", "inputs.json", "--save-outputs", "values.json",
    ]  # fmt: skip


def bisect(backend: str, shapes: Mapping[str, Sequence[int]], floor_db: float, provider: str = "cpu") -> list[str]:
    """Cut the typed graph down to the first node whose output leaves values.json: the last node of reduced.onnx."""
    model = "polygraphy_debug.onnx"
    check = [*_run(model, backend, shapes, provider), "--load-outputs", "values.json", *_judged(floor_db)]
    return [
        "polygraphy", "debug", "reduce", "typed/model.onnx", "-o", "reduced.onnx", "--mode", "bisect",
        "--no-reduce-inputs", "--load-inputs", "inputs.json", "--check", *check,
    ]  # fmt: skip


def _run(model: str, backend: str, shapes: Mapping[str, Sequence[int]], provider: str) -> list[str]:
    providers = _PROVIDERS.get(provider, ())
    runner = _RUNNERS.get(backend, ("--onnxrt", *(("--providers", *providers) if providers else ())))
    # A dynamic graph needs a profile: that of this one call.
    given = [f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items()]
    sides = [f"--trt-{side}-shapes" for side in ("min", "opt", "max")] if runner[0] == "--trt" else []
    profile = [word for side in sides for word in (side, *given)]
    return ["polygraphy", "run", model, *runner, *profile, "--load-inputs", "inputs.json"]


def _judged(floor_db: float) -> list[str]:
    return ["--compare", "snr", "--snr-threshold", f"{floor_db:g}"]
