"""What a model on disk or on the hub is made of: the diffusers layout, read without its weights.

A `Tree` is a place that holds such a layout; `read_tree` chooses the files a build may read,
hashes them and parses the configs into a `Source`. It refuses whatever would fail later: missing
folders, unreadable JSON, pickles, truncated safetensors. It knows no network.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sdcompile import checkpoint, edits
from sdcompile.errors import HostError, RecipeError, SdcompileError, StageError
from sdcompile.spec import Say

CHECKPOINT = "checkpoint.safetensors"
"""What a single-file source is called among a Source's files, whatever the user calls it."""

ASSETS = ("tokenizer", "scheduler")
PICTURES, CAPTION = "pictures", ".txt"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
VARIANTS = ("fp16", "bf16")

_TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip

_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "BOOL"})
"""Of weights, and of the positions that text encoders of old store beside them. What else there is, is quantized."""

_LICENCE = re.compile(r"^(license(?:_name)?):[ \t]*(?:\n-[ \t]*)?(.+?)[ \t]*$", re.MULTILINE)

Origin = Literal["builtin", "folder", "hub", "file"]
HashFile = Callable[[Path], str]


@dataclass(frozen=True)
class SourceFile:
    """sha256 and size of one file of a source."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Tree:
    """A place that holds a diffusers layout.

    name      how messages call it: what the recipe says
    sizes     relative path -> bytes, of all there is (top level and the folders asked for)
    get       relative path -> the file on this disk (downloads it where it is not)
    hashes    relative path -> sha256, where known without reading the file
    partial   for a cache, which may hold only some files: what to do about one that is missing
    licence   where it is stated above the tree
    id, kind, revision, notes: see Source
    """

    name: str
    id: str
    kind: Origin
    sizes: Mapping[str, int]
    get: Callable[[str], Path]
    hashes: Mapping[str, str] = field(default_factory=dict)
    partial: str = ""
    revision: str | None = None
    notes: tuple[str, ...] = ()
    licence: str | None = None


@dataclass(frozen=True)
class Source:
    """A model to build from, described without reading its weights.

    id         "builtin:tiny", "folder:<name>", "hf://org/name@<commit>" or "file:<name>": never a
               path of this machine, since it enters keys and manifests
    revision   the hub commit
    licence    as the model card (`license:`) or the LICENSE file's first line states it
    files      relative path -> SourceFile, of the only files a build may read
    configs    model_index, scheduler, tokenizer and one per folder, parsed
    notes      warnings for the plan
    parts      component -> its own source, where the recipe names one; it counts as a folder of this source
    pictures   those that recovery learns on, where the recipe names some; they count as a folder `PICTURES`
    shares     for a single-file source: folder -> bytes of the checkpoint that are this folder's
    counts     folder -> weight -> how many numbers, where the files are on this disk already
    edits      folder -> what had been taken out of a pruned component (see `sdcompile.edits`)
    place      (files, say) -> a folder that holds them
    """

    id: str
    kind: Origin
    revision: str | None
    licence: str | None
    files: Mapping[str, SourceFile]
    configs: Mapping[str, dict[str, Any]]
    notes: tuple[str, ...] = ()
    parts: Mapping[str, Source] = field(default_factory=dict)
    pictures: Source | None = None
    shares: Mapping[str, int] = field(default_factory=dict, repr=False)
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict, repr=False)
    edits: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict, repr=False)
    place: Callable[[tuple[str, ...], Say], Path] | None = field(default=None, repr=False, compare=False)

    def with_parts(self, parts: Mapping[str, Source]) -> Source:
        """This source with components from sources of their own."""
        configs = {component: part.configs[component] for component, part in parts.items()}
        notes = [note for part in parts.values() for note in part.notes]
        return replace(self, parts=parts, configs={**self.configs, **configs}, notes=(*self.notes, *notes))

    def _owner(self, folder: str) -> Source:
        """The source whose files are `folder`'s."""
        return self.pictures if folder == PICTURES and self.pictures else self.parts.get(folder, self)

    def kind_of(self, folder: str) -> Origin:
        return self._owner(folder).kind

    def folder_files(self, folder: str) -> Mapping[str, SourceFile]:
        """The files that make up `folder`; a single-file checkpoint counts with its share alone."""
        if (owner := self._owner(folder)) is not self:
            return owner.files
        own = {path: f for path, f in self.files.items() if path.startswith(f"{folder}/")}
        if folder in self.shares:
            own[CHECKPOINT] = SourceFile(self.files[CHECKPOINT].sha256, self.shares[folder])
        return own

    def fp32_bytes(self, folder: str) -> int:
        """What the weights of `folder` take in fp32, in which every module is loaded.

        Of weights still to be downloaded, their size as stored tells (twice that of a half-precision variant).
        """
        counts = self.parts.get(folder, self).counts
        if folder in counts:
            return 4 * sum(counts[folder].values())
        half = re.compile(rf"\.({'|'.join(VARIANTS)})[.-]")
        return sum(
            f.bytes * (2 if half.search(path) else 1)
            for path, f in self.folder_files(folder).items()
            if path.endswith(".safetensors")
        )

    def locate(self, folders: tuple[str, ...], say: Say) -> Path:
        """A folder on this disk that holds `folders`, or what one component's own source holds; downloads
        what is missing. Raises HostError when the hub cannot give it.
        """
        owner = self._owner(folders[0]) if len(folders) == 1 else self
        assert owner.place is not None, "this source was made without a place"
        wanted = dict.fromkeys(path for folder in folders for path in self.folder_files(folder))
        return owner.place(tuple(wanted), say)


def local_tree(root: Path, name: str, identity: str, kind: Origin, folders: tuple[str, ...]) -> Tree:
    """The tree of a folder on this disk; looks at its top level, `folders`, tokenizer and scheduler."""
    places = [root, *(root / folder for folder in (*folders, *ASSETS) if (root / folder).is_dir())]
    found = (path for place in places for path in sorted(place.iterdir()) if path.is_file())
    sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in found}
    return Tree(name, identity, kind, sizes, lambda relative: root / relative)


def entries(tree: Tree, paths: Iterable[str], hash_file: HashFile) -> dict[str, SourceFile]:
    """Path -> SourceFile of these files of `tree`."""
    return {path: SourceFile(tree.hashes.get(path) or hash_file(tree.get(path)), tree.sizes[path]) for path in paths}


def placing(tree: Tree, top: str) -> Callable[[tuple[str, ...], Say], Path]:
    """Gets files of `tree`, and tells the folder that holds them: that of its file `top`."""

    def place(paths: tuple[str, ...], say: Say) -> Path:
        done, total = 0, sum(tree.sizes[path] for path in paths) or 1
        for path in paths:
            if tree.kind == "hub":
                say(f"fetching {path} ({tree.sizes[path] / 1e6:.0f} MB)", done / total)
            tree.get(path)
            done += tree.sizes[path]
        return tree.get(top).parent

    return place


def read_tree(tree: Tree, folders: tuple[str, ...], hash_file: HashFile, *, weights: bool = True) -> Source:
    """Read the configs of `tree` and choose the files a build may read (`weights=False`: but no weights).

    Raises RecipeError with every fault at once; HostError where the fault is that a cache lacks files.
    """
    notes = tree.notes
    faults: list[SdcompileError] = []
    configs: dict[str, dict[str, Any]] = {}
    chosen: list[str] = []
    counts: dict[str, dict[str, int]] = {}
    pruned: dict[str, list[dict[str, Any]]] = {}
    if "model_index.json" not in tree.sizes:
        raise RecipeError(
            f"source {tree.name} has no model_index.json, so it is not a diffusers folder",
            "expected what DiffusionPipeline.save_pretrained(FOLDER) writes",
        )
    wanted = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
    wanted |= {folder: f"{folder}/config.json" for folder in folders}
    for name, path in wanted.items():
        try:
            configs[name] = config_in(tree, path)
            chosen.append(path)
            if name in folders and weights:
                files, remarks = weights_in(tree, name, configs[name])
                chosen += files
                notes += remarks
                if (made := f"{name}/{edits.FILE}") in tree.sizes:
                    chosen.append(made)
                    pruned[name] = edits.read(tree.get(made).parent)
                    notes += (f"{name}: the source is pruned already; what it computes now is what counts as right",)
                if counted := counted_weights(tree, files):
                    counts[name] = counted
        except SdcompileError as fault:
            faults.append(fault)
    try:
        chosen += (assets := _tokenizer(tree))
        tokenizer_config = "tokenizer/tokenizer_config.json"
        configs["tokenizer"] = config_in(tree, tokenizer_config) if tokenizer_config in assets else {}
    except SdcompileError as fault:
        faults.append(fault)
    if faults and tree.partial:
        lacking = "\n".join(fault.message for fault in faults)
        raise HostError(f"{lacking}\nin the hub cache of this machine, and this build is offline", tree.partial)
    if faults:
        hints = dict.fromkeys(fault.hint for fault in faults if fault.hint)
        raise RecipeError("\n".join(fault.message for fault in faults), "\n".join(hints))

    return Source(
        tree.id, tree.kind, tree.revision, licence_of(tree), entries(tree, chosen, hash_file), configs, notes,
        counts=counts, edits=pruned, place=placing(tree, "model_index.json"),
    )  # fmt: skip


def config_in(tree: Tree, path: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises RecipeError that names the file."""
    if path not in tree.sizes:
        folder = path.rpartition("/")[0]
        there = any(name.startswith(f"{folder}/") for name in tree.sizes)
        missing = path if there or not folder else f"folder {folder}/ (with {path.rpartition('/')[2]})"
        raise RecipeError(
            f"source {tree.name} has no {missing}",
            "a source is a whole diffusers folder, as DiffusionPipeline.save_pretrained(FOLDER) writes it",
        )
    try:
        config = json.loads(tree.get(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"source {tree.name}: {path} is not JSON: {error}", "write the file again") from error
    except OSError as error:
        raise RecipeError(f"source {tree.name}: {path} cannot be read: {error.strerror}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"source {tree.name}: {path} holds a JSON {type(config).__name__}, not an object")
    return config


def weights_in(tree: Tree, folder: str, config: Mapping[str, Any]) -> tuple[list[str], tuple[str, ...]]:
    """(weight files of `folder`, notes): plain weights, else a half-precision variant that stands alone.

    `folder` "" is the tree's top level.
    """
    inside = f"{folder}/" if folder else ""
    names = [path.removeprefix(inside) for path in tree.sizes if path.startswith(inside)]
    # transformers writes `architectures`, diffusers `_class_name`; each has its own file name.
    stem = "model" if "architectures" in config and "_class_name" not in config else "diffusion_pytorch_model"
    for variant in (None, *VARIANTS):
        tag = f".{variant}" if variant else ""
        whole, index = f"{stem}{tag}.safetensors", f"{stem}.safetensors.index{tag}.json"
        if whole in names:
            files = [f"{inside}{whole}"]
        elif index in names:
            files = [f"{inside}{index}", *_shards(tree, inside, index)]
        else:
            continue
        return files, (
            f"{folder or tree.name}: the source has {variant} weights only; fp32 is made from them",
        ) if variant else ()
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        kind = "" if folder else str(config.get("_class_name"))
        raise RecipeError(
            f"source {tree.name}: {inside or 'it'} has {pickles[0]} but no {stem}.safetensors; "
            "a pickle can run code when it is read",
            f"convert it: {convert_command(tree.name, 'from_pretrained', kind)}  and name NEW_FOLDER as the source",
        )
    others = [name for name in names if name.endswith(".safetensors")]
    raise RecipeError(
        f"source {tree.name}: {inside or 'it'} has no {stem}.safetensors"
        + (f" (but {', '.join(others)})" if others else ""),
        f"expected {stem}.safetensors (or its {' or '.join(VARIANTS)} variant), or shards and "
        f"{stem}.safetensors.index.json",
    )


def _shards(tree: Tree, inside: str, index: str) -> list[str]:
    """The files a sharded checkpoint's index names. Raises RecipeError for one that is missing or elsewhere."""
    weight_map = config_in(tree, f"{inside}{index}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise RecipeError(f"source {tree.name}: {inside}{index} has no weight_map of tensors to files")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if f"{inside}{shard}" not in tree.sizes or not shard.endswith(".safetensors"):
            raise RecipeError(
                f"source {tree.name}: {inside}{index} names {shard}, which is not in {inside or 'it'}",
                "copy the model again",
            )
    return [f"{inside}{shard}" for shard in shards]


def counted_weights(tree: Tree, files: Iterable[str]) -> dict[str, int]:
    """Name -> how many numbers, of the weights in `files`; of none that are not on this disk yet (their sha256 is
    told instead).

    Raises RecipeError for one that is cut short or is no safetensors file.
    """
    return {
        name: math.prod(entry["shape"])
        for path in files
        if path.endswith(".safetensors") and path not in tree.hashes
        for name, entry in check_safetensors(tree.get(path), f"source {tree.name}: {path}").items()
    }


def check_safetensors(file: Path, name: str) -> dict[str, dict[str, Any]]:
    """The header of a whole safetensors file. Raises RecipeError that calls it `name`."""
    try:
        with file.open("rb") as opened:
            if opened.read(22) == b"version https://git-lf":
                raise RecipeError(f"{name} is a Git LFS pointer, not the weights", "run `git lfs pull` in the source")
        header = checkpoint.safetensors_header(file)
        narrow = {entry["dtype"] for entry in header.values()} - _DTYPES
        if narrow:
            raise RecipeError(
                f"{name} holds {', '.join(sorted(narrow))}: it is quantized already",
                "name the original weights as source",
            )
        return header
    except StageError as error:
        reason = error.message.removeprefix(f"{file.name} ")
    except (AttributeError, KeyError, TypeError) as error:
        reason = f"is not a safetensors file: its header lacks {error}"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    raise RecipeError(f"{name} {reason}", "download or copy the file again")


def _tokenizer(tree: Tree) -> list[str]:
    found = [path for name in _TOKENIZER_FILES if (path := f"tokenizer/{name}") in tree.sizes]
    if "tokenizer/tokenizer.json" not in found and not {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= set(found):
        raise RecipeError(
            f"source {tree.name} has no tokenizer/tokenizer.json, nor tokenizer/vocab.json with tokenizer/merges.txt",
            "a source is a whole diffusers folder, as DiffusionPipeline.save_pretrained(FOLDER) writes it",
        )
    return found


def licence_of(tree: Tree) -> str | None:
    """`license:` of the model card's front matter, or the first line of a LICENSE file."""
    stated: str
    if tree.licence is not None:
        return tree.licence
    if "README.md" in tree.sizes:
        text = tree.get("README.md").read_text(encoding="utf-8", errors="replace")
        front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        fields = dict(_LICENCE.findall(front[1])) if front else {}
        # `license: other` is told apart by its name.
        stated = fields.get("license_name") or fields.get("license") or ""
        if stated:
            return stated.strip("'\"")
    for name in sorted(tree.sizes):
        if "/" not in name and name.lower().startswith("licen"):
            lines = tree.get(name).read_text(encoding="utf-8", errors="replace").splitlines()
            stated = next((line.strip() for line in lines if line.strip()), "")
            if stated:
                return stated
    return None


def convert_command(source: str, how: str, kind: str = "") -> str:
    source = source.removeprefix("hf://").partition("@")[0] if source.startswith("hf://") else source
    return (
        f'python -c "from diffusers import {kind or "StableDiffusionPipeline"} as P; '
        f"P.{how}({source!r}).save_pretrained('NEW_FOLDER', safe_serialization=True)\""
    )
