"""Steps: functions from folders to a folder, and the table of them.

Every op has the shape `run(inputs: Mapping[str, Path], out: Path, job: Job) -> None`: it reads
the folders it is given by role and writes into the empty folder `out`. An op knows no store and
no recipe; who calls it with what is the plan's business. This table is all the plan needs, so
that planning imports none of the rooms below.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdcompile.spec import Kind, Stage


@dataclass(frozen=True)
class Op:
    """Where an op lives, what it gives, and what besides its inputs decides its bytes.

    revision   to be raised whenever the bytes the op writes for the same inputs change
    packages   distributions whose versions decide those bytes; without them the op cannot run here
    host       True when the bytes also depend on this machine's processor
    """

    module: str
    stage: Stage
    gives: Kind
    function: str = "run"
    revision: int = 1
    packages: tuple[str, ...] = ()
    host: bool = False


_TORCH = ("torch", "diffusers", "transformers")

OPS: dict[str, Op] = {
    "checkpoint": Op("sdcompile.steps.fetch", "fetch", "checkpoint", revision=2),
    "assets": Op("sdcompile.steps.fetch", "fetch", "checkpoint", function="run_assets"),
    "onnx": Op("sdcompile.steps.export_onnx", "export", "onnx", packages=(*_TORCH, "onnx", "onnxscript")),
    "tokenizer": Op("sdcompile.steps.tokenizer", "compile", "tokenizer", packages=("transformers", "tokenizers")),
    "samplers": Op("sdcompile.steps.sampler", "compile", "tables", revision=3, packages=("diffusers",)),
    "fit": Op("sdcompile.steps.fit", "compile", "tables", revision=2, packages=_TORCH),
    "calibrate": Op("sdcompile.steps.calibrate", "calibrate", "samples", revision=3, packages=_TORCH),
    "pictures": Op("sdcompile.steps.pictures", "calibrate", "samples", packages=(*_TORCH, "pillow")),
    "race": Op("sdcompile.steps.race", "compile", "race", revision=2, host=True),
    "record": Op("sdcompile.steps.record", "verify", "samples", revision=3, packages=_TORCH),
    "engine": Op("sdcompile.steps.verify", "verify", "report", revision=4, host=True),
    "images": Op("sdcompile.steps.verify_images", "verify", "report", revision=4, host=True),
    "each_pass": Op("sdcompile.steps.each_pass", "verify", "effects", host=True),
    "bundle": Op("sdcompile.steps.package", "package", "bundle", revision=8),
}
