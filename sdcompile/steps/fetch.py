"""source -> checkpoint folders: what a model is made of, and putting its files where steps read them.

`describe` reads metadata alone (configs, sizes, hashes), so that planning stays quick; weights
are downloaded, linked or converted only when a step asks for them. Safetensors only: a pickle
can run code when it is read. This room knows file layouts; it refuses to know what a UNet is
(the family), what the hub's network looks like (`steps.hub`) and how old single-file
checkpoints name their tensors (`steps.single_file`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from sdcompile import checkpoint
from sdcompile.bundle import sha256_of
from sdcompile.errors import RecipeError, StageError
from sdcompile.files import link
from sdcompile.spec import Job
from sdcompile.steps.layout import (
    ASSETS,
    CHECKPOINT,
    PICKLES,
    VARIANTS,
    HashFile,
    Source,
    SourceFile,
    Tree,
    convert_command,
    local_tree,
    read_tree,
)

__all__ = ["ASSETS", "CHECKPOINT", "REVISION", "Source", "SourceFile", "describe", "run", "run_assets"]

REVISION = 1

_MODELS = Path(__file__).parent.parent / "models"
_VARIANT = re.compile(rf"\.(?:{'|'.join(VARIANTS)})(?=[.-])")


def describe(
    source: str,
    *,
    base: Path,
    source_config: str | None = None,
    folders: Iterable[str],
    offline: bool,
    hash_file: HashFile,
) -> Source:
    """What `source` holds of `folders` (and of tokenizer and scheduler).

    Relative paths start at `base`. `offline` (or HF_HUB_OFFLINE=1) never touches the network.
    Raises RecipeError with every fault of the source at once, HostError when the hub cannot be
    reached or asked.
    """  # fmt: skip
    folders = tuple(folders)
    if source.lower().endswith(PICKLES):
        raise RecipeError(
            f"source {source} is a pickle, which can run code when it is read; only safetensors are",
            f"convert it: {convert_command(source, 'from_single_file')}  and name NEW_FOLDER as the source",
        )
    opened = partial(open_tree, base=base, folders=folders, offline=offline)
    path = None if source.startswith(("builtin:", "hf://")) else base / Path(source).expanduser()
    if path and path.suffix.lower() == ".safetensors" and not path.is_dir():
        from sdcompile.steps import single_file

        return single_file.describe(source, path, source_config, opened, folders, hash_file)
    return read_tree(opened(source), folders, hash_file)


def open_tree(source: str, *, base: Path, folders: tuple[str, ...], offline: bool) -> Tree:
    """The tree of a source that is laid out in folders. Raises RecipeError and HostError as `describe` does."""
    if source.startswith("hf://"):
        from sdcompile.steps import hub

        return hub.open_tree(source, offline)
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        built_in = sorted(path.parent.name for path in _MODELS.glob("*/model_index.json"))
        if name not in built_in:
            raise RecipeError(
                f"{source} is not built in", f"built in: {', '.join(f'builtin:{n}' for n in built_in) or 'none'}"
            )
        return local_tree(_MODELS / name, source, source, "builtin", folders)
    root = base / Path(source).expanduser()
    if not root.exists():
        raise RecipeError(
            f"source {source} does not exist",
            f"a relative path starts at the recipe's folder ({base}); a model of the hub is hf://org/name@revision",
        )
    if not root.is_dir():
        raise RecipeError(
            f"source {source} is neither a folder nor a .safetensors file",
            "expected builtin:NAME, hf://org/name@revision, a diffusers folder or a .safetensors file",
        )
    return local_tree(root, source, f"folder:{root.resolve().name}", "folder", folders)


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """One source folder -> a checkpoint folder: config.json and weights under their canonical names.

    job.params: kind, folder, files (relative path -> sha256, as planned). fp32 weights are linked,
    half-precision ones rewritten as fp32, a single-file checkpoint is converted. Raises StageError
    when a file is no longer what it was when it was planned.
    """
    root, folder = inputs["source"], job.params["folder"]
    _verify(root, job)
    if job.params["kind"] == "file":
        from sdcompile.steps import single_file

        single_file.convert(root / CHECKPOINT, root / folder / "config.json", folder, out, job.say)
    else:
        _link(root, folder, tuple(job.params["files"]), out)
    for path in out.glob("*.safetensors"):
        job.say(f"widening {path.name}", None)
        checkpoint.widen(path)


def _link(root: Path, folder: str, paths: tuple[str, ...], out: Path) -> None:
    """Hard-link `folder`'s files under the names from_pretrained looks for; an index is rewritten to match."""
    for path in paths:
        target = out / _VARIANT.sub("", path.removeprefix(f"{folder}/"))
        if ".safetensors.index" in path:
            index = json.loads((root / path).read_text(encoding="utf-8"))
            index["weight_map"] = {name: _VARIANT.sub("", file) for name, file in index["weight_map"].items()}
            target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        else:
            link(root / path, target)


def run_assets(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Tokenizer and scheduler (and whatever else `files` names), in their sub-folders."""
    root = inputs["source"]
    _verify(root, job)
    for path in job.params["files"]:
        if path != CHECKPOINT:
            link(root / path, out / path)


def _verify(root: Path, job: Job) -> None:
    for path, expected in job.params["files"].items():
        try:
            job.say(f"checking {path}", None)
            found = sha256_of(root / path)
        except OSError as error:
            raise StageError(
                f"{path} of the source cannot be read: {error.strerror}", "put it back, and run the same command again"
            ) from error
        if found != expected:
            raise StageError(
                f"{path} of the source changed since the build was planned: "
                f"its sha256 is {found[:12]}…, planned {expected[:12]}…",
                "let the source rest, then run the same command again",
            )
