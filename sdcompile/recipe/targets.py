"""Targets: the engines one recipe builds side by side, for one bundle that runs in several places.

A target says only what engines are made with. What the model is (source, shapes, samplers, pruning) is
the recipe's, so that every target draws the same pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from sdcompile.bundle import folder_of_target
from sdcompile.recipe.compression import CastRecipe, QuantizeRecipe
from sdcompile.recipe.fields import Number, Part, String, fault, shown
from sdcompile.recipe.names import BackendName
from sdcompile.recipe.sections import FloorRecipe, VerifyRecipe, empty_for_null
from sdcompile.spec import Precision

if TYPE_CHECKING:
    from sdcompile.recipe.yamltext import Place

CAPABILITIES = "compute_capabilities"
"""The build option that the part of a target's text after its colon sets."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_:-]{0,63}")


def _target_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise fault(f"'{value}' is no name of a target: up to 64 letters, digits, '_', ':' and '-', as in gpu-int8")
    return value


def spelled_out(entry: Any) -> Any:
    """A target as written -> the mapping it stands for; what is neither text nor a mapping stays as it is.

    "tensorrt_rtx:sm89" is {name: tensorrt_rtx:sm89, backend: tensorrt_rtx, build: {compute_capabilities: [sm89]}}.
    Without a name, a mapping is called as its backend is written.
    """
    data = {"backend": entry} if isinstance(entry, str) else entry
    if not isinstance(data, Mapping) or not isinstance(text := data.get("backend"), str):
        return data
    backend, colon, capability = text.partition(":")
    build = data.get("build")
    if colon and (build is None or isinstance(build, Mapping)):
        build = {CAPABILITIES: [capability], **(build or {})}
    named = text if data.get("name") is None else data["name"]
    return {**data, "name": named, "backend": backend, **({} if build is None else {"build": build})}


class TargetComponentRecipe(Part):
    """One component's own settings in one target, over the recipe's for that component."""

    backend: BackendName | None = Field(default=None, description="Backend of this component.")
    precision: Precision | None = Field(default=None, description="Precision of this component.")
    build: dict[str, Any] = Field(default_factory=dict, description="Options of this component's backend.")
    quantize: QuantizeRecipe | None = Field(
        default=None, description="How this component is quantized, over what the recipe says of it."
    )
    cast: CastRecipe | None = Field(
        default=None, description="What stays in float32 where this component is cast to fp16 or bf16."
    )


class TargetVerifyRecipe(Part):
    """Floors of one target, over the recipe's; keys are component names."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, FloorRecipe]

    min_image_psnr_db: Number | None = Field(default=None, description="Lowest PSNR of any whole image, in dB.")

    @model_validator(mode="before")
    @classmethod
    def _bare_names(cls, data: Any) -> Any:
        return empty_for_null(data, but=cls.model_fields)

    def over(self, default: VerifyRecipe) -> VerifyRecipe:
        """`default` with these floors laid over its own."""
        given, own = default.model_dump(exclude_none=True), self.model_dump(exclude_none=True)
        laid = {
            key: {**given.get(key, {}), **value} if isinstance(value, dict) else value for key, value in own.items()
        }
        return VerifyRecipe.model_validate({**given, **laid})


class TargetRecipe(Part):
    """One target: the text BACKEND or BACKEND:COMPUTE_CAPABILITY, as in tensorrt_rtx:sm89, or this mapping."""

    name: Annotated[String, AfterValidator(_target_name)] = Field(
        default="", description="What `--target` calls it. Unset = the backend, as written."
    )
    backend: BackendName = Field(description="Backend of every component, with its compute capability if it has one.")
    precision: Precision | None = Field(
        default=None, description="Precision of every component that names none itself. Unset = the recipe's."
    )
    build: dict[str, Any] = Field(default_factory=dict, description="Options of `backend`.")
    components: Annotated[dict[str, TargetComponentRecipe], BeforeValidator(empty_for_null)] = Field(
        default_factory=dict, description="Settings per component, over the recipe's."
    )
    verify: TargetVerifyRecipe | None = Field(default=None, description="Floors of this target, over the recipe's.")

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, data: Any) -> Any:
        if not isinstance(data, (str, Mapping, TargetRecipe)):
            raise fault(f"expected a backend's name, or a mapping with a backend, got {shown(data)}")
        return spelled_out(data)


def target_faults(data: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """Faults between `targets` and the rest of a recipe as written: what is said twice, and names met twice."""
    targets = data.get("targets")
    if targets is None:
        if data.get("backend") is None:
            yield ("backend",), "missing field 'backend' (or a list of `targets`)"
        return
    if data.get("backend") is not None:
        yield ("backend",), "targets name the backends; leave one of the two fields out"
    if data.get("build"):
        yield ("build",), "which backend is it for? write it in a target: {backend: ..., build: {...}}"
    components = data.get("components")
    for name, own in components.items() if isinstance(components, Mapping) else ():
        for field in ("backend", "build", "cast"):
            if isinstance(own, Mapping) and own.get(field):
                at: Place = ("components", name, field)
                yield at, f"targets choose backends; write it in a target: components: {{{name}: {{{field}: ...}}}}"
    if not isinstance(targets, (list, tuple)):
        return
    met: dict[str, str] = {}
    for index, entry in enumerate(targets):
        if isinstance(entry, Mapping) and ":" in str(entry.get("backend")):
            build = entry.get("build")
            if isinstance(build, Mapping) and build.get(CAPABILITIES) is not None:
                text = f"{CAPABILITIES} are named twice: here and in backend '{entry['backend']}'"
                yield ("targets", index, "build", CAPABILITIES), text
        told = spelled_out(entry)
        name = told.get("name") if isinstance(told, Mapping) else None
        if not isinstance(name, str):
            continue
        # A name is also a folder of the bundle, on any file system.
        folder = folder_of_target(name).lower()
        if folder in met:
            other = "" if met[folder] == name else f" (as '{met[folder]}', too)"
            yield ("targets", index), f"target '{name}' is listed twice{other}; give one of them a name of its own"
        met.setdefault(folder, name)
