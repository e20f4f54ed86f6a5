"""The bundle: the one thing the compiler writes and the runtime reads.

    NAME.sdc/
      manifest.json       what this is, made of what, by what, for what, and how it was verified
      README.md           the command that runs it
      components/<name>/  engine files, as the backend wrote them
      samplers/<name>.npz compiled sampler tables
      tokenizer/          tokenizer.json
      profiles.json       named sets of options, for people to edit: the one file without a hash
      reports/            verify.json, verify.xml (JUnit)

A bundle of several targets keeps components/<target>/<component>/ and reports/<target>/. What two targets
share, a whole component or a single file, is there once: the manifest names the folder, and files of the
same content are hard links to each other.

This room knows files and hashes. It refuses to know how an engine is built or run.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from sdcompile.errors import BundleError
from sdcompile.spec import ComponentSpec, Precision, Range, Shapes

SCHEMA_VERSION = 2
"""The newest manifest schema. 1: one target. 2: several. A manifest is written in the lowest that holds it, so
that a bundle of one target also runs where only schema 1 is read."""

_READ = range(1, SCHEMA_VERSION + 1)
SUFFIX = ".sdc"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Frozen):
    """Size and sha256 of one file, keyed by its path relative to the bundle."""

    bytes: int
    sha256: str


class ComponentEntry(_Frozen):
    """One engine: what made it, what it takes, what really ran when it was verified, and how well.

    `effects`: what each pass on its way did, in order: {"pass": name, ...its effect.json}. `races`: how it
    did against the same component unquantized or unpruned (`of`: "quantize" or "prune"), where the recipe asked.
    """

    backend: str
    precision: Precision
    params: dict[str, Any] = Field(default_factory=dict)
    spec: dict[str, Any]
    facts: dict[str, Any] = Field(default_factory=dict)
    verification: dict[str, Any] = Field(default_factory=dict)
    effects: list[dict[str, Any]] = Field(default_factory=list)
    races: list[dict[str, Any]] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    @model_serializer(mode="wrap")
    def _readable_by_older_readers(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """They know no `races`, and most bundles have none."""
        data: dict[str, Any] = dump(self)
        return data if self.races else {key: value for key, value in data.items() if key != "races"}

    @model_validator(mode="before")
    @classmethod
    def _of_older_bundles(cls, data: Any) -> Any:
        """Once there was one race at most, int8's."""
        if not isinstance(data, dict) or "race" not in data:
            return data
        race = data["race"] and {"of": "quantize", "name": data["race"].get("precision"), **data["race"]}
        return {key: value for key, value in data.items() if key != "race"} | {"races": [race] if race else []}


class TargetEntry(_Frozen):
    """One target of a bundle of several. folders: component -> its folder, relative to the bundle."""

    folders: dict[str, str]
    components: dict[str, ComponentEntry]
    verification: dict[str, Any]


class SamplerEntry(_Frozen):
    """One compiled sampler: the diffusers scheduler it stands for and the step counts it holds.

    `fit` tells of a fitted one how near it and its base come to the teacher, and which of them was kept.
    """

    file: str
    scheduler: str
    config: dict[str, Any] = Field(default_factory=dict)
    num_inference_steps: tuple[int, ...]
    fit: dict[str, Any] = Field(default_factory=dict)


class TokenizerEntry(_Frozen):
    """How prompts become ids: the tokenizer.json, the padding id and the length of one chunk."""

    file: str
    max_length: int
    pad_id: int
    bos_id: int
    eos_id: int


class Defaults(_Frozen):
    """What a request that leaves an argument open gets; `options` are those of runtime.options set besides."""

    sampler: str
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    negative_prompt: str = ""
    options: dict[str, Any] = Field(default_factory=dict)


class Manifest(_Frozen):
    """Everything a bundle says of itself. `facts` are the family's (see `Family.facts`).

    With several `targets`, in the order of preference, `components` is empty: who reads or runs engines takes
    one target, `of_target`, which looks like the manifest of a bundle of that target alone.
    """

    schema_version: int = 1
    name: str
    family: str
    sdcompile: str
    built_at: str
    recipe: dict[str, Any]
    source: dict[str, Any]
    licence: str | None = None
    tools: dict[str, str]
    host: dict[str, Any]
    facts: dict[str, Any]
    shapes: dict[str, tuple[int, int, int]]
    components: dict[str, ComponentEntry]
    targets: dict[str, TargetEntry] = Field(default_factory=dict)
    tokenizer: TokenizerEntry
    samplers: dict[str, SamplerEntry]
    defaults: Defaults
    verification: dict[str, Any]
    files: dict[str, FileEntry]

    _target: str = PrivateAttr(default="")
    _folders: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def target(self) -> str:
        """Which of several targets this is; "" where the bundle has one."""
        return self._target

    def by_target(self) -> dict[str, Manifest]:
        """Target -> the manifest of that target alone, the preferred first; {"": this one} where there is one."""
        return {name: self.of_target(name) for name in self.targets} if self.targets else {"": self}

    def of_target(self, name: str) -> Manifest:
        """The manifest as if the target `name` were the only one; its components stay in their folders."""
        entry = self.targets[name]
        update = {"components": entry.components, "verification": entry.verification, "targets": {}}
        one = self.model_copy(update=update)
        one._target, one._folders = name, dict(entry.folders)
        return one

    def folder_of(self, component: str) -> str:
        """Where a component lies, relative to the bundle."""
        return self._folders.get(component) or f"components/{component}"

    @property
    def reports(self) -> str:
        """Where the reports lie, relative to the bundle."""
        return f"reports/{folder_of_target(self._target)}" if self._target else "reports"

    def ranges(self) -> Shapes:
        return {letter: Range(*bounds) for letter, bounds in self.shapes.items()}

    def component_spec(self, name: str) -> ComponentSpec:
        return ComponentSpec.from_json(name, self.components[name].spec)


def folder_of_target(name: str) -> str:
    """The name of a target as that of a folder: tensorrt_rtx:sm89 -> tensorrt_rtx-sm89."""
    return name.replace(":", "-")


def digest(folder: Path) -> str:
    """sha256 of the manifest, which holds the sha256 of every other file: the bundle's identity."""
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry_of(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))


def read(folder: str | Path) -> Manifest:
    """The manifest of the bundle at `folder`.

    Raises BundleError when the path is no bundle, the manifest is damaged, or its schema is
    newer than this version of sdcompile reads.
    """
    folder = Path(folder)
    if not folder.exists():
        raise BundleError(f"{folder} does not exist", "build one: sdcompile build RECIPE")
    if not folder.is_dir():
        raise BundleError(f"{folder} is a file; a bundle is a folder named NAME{SUFFIX}")
    path = folder / "manifest.json"
    if not path.is_file():
        raise BundleError(f"{folder} has no manifest.json, so it is not a bundle (or an unfinished copy of one)")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is damaged: {error}", "copy the bundle again, or rebuild it") from error
    if version not in _READ:
        raise BundleError(
            f"{folder} has manifest schema {version}; this sdcompile reads schema {_READ[0]} to {_READ[-1]}",
            "upgrade sdcompile, or rebuild the bundle with this version",
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(
            f"{path} is damaged: {where}: {first['msg']}", "copy the bundle again, or rebuild it"
        ) from error


def check(folder: Path, manifest: Manifest, prefixes: tuple[str, ...] = ("",)) -> None:
    """Check the files whose path starts with one of `prefixes` against the manifest's hashes.

    Raises BundleError naming the first file that is missing, truncated or altered.
    """
    for relative, entry in manifest.files.items():
        if not relative.startswith(prefixes):
            continue
        path = folder / relative
        if not path.is_file():
            raise BundleError(f"{folder}: {relative} is missing", "copy the bundle again, or rebuild it")
        size = path.stat().st_size
        if size != entry.bytes:
            raise BundleError(
                f"{folder}: {relative} has {size} bytes where the manifest says {entry.bytes}: truncated or altered",
                "copy the bundle again, or rebuild it",
            )
        if sha256_of(path) != entry.sha256:
            raise BundleError(
                f"{folder}: {relative} does not match its sha256 in the manifest: altered or damaged",
                "copy the bundle again, or rebuild it",
            )


def write(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into `folder`, last of all its files."""
    data = manifest.model_dump(mode="json")
    data["schema_version"] = 2 if manifest.targets else 1
    if not manifest.targets:
        del data["targets"]  # schema 1 has no such field
    text = json.dumps(data, indent=2, ensure_ascii=False, sort_keys=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")
