"""What a person writes: the fields of a recipe, what each may be, and how they fit together.

An unset field means "inherit"; `null` is the same as leaving a field out. Names of families,
backends, components and samplers are checked against the tables handed over as validation
context (`Known`); without a context only the structure is checked. This file knows no YAML.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    model_validator,
)

from sdcompile.recipe.fields import (
    MAX_STEPS,
    FileName,
    Number,
    Size,
    Source,
    SourceText,
    Span,
    String,
    Whole,
    did_you_mean,
    fault,
    parse_source,
    shown,
)
from sdcompile.spec import Precision


@dataclass(frozen=True)
class Known:
    """The names the tables hold. `families`: name -> component -> recipe fields that component
    understands (e.g. clip_skip); `backends`: name -> pydantic model of its `build` options, or None.
    Names are not checked against a table left empty."""

    families: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    backends: Mapping[str, type[BaseModel] | None] = field(default_factory=dict)
    samplers: Collection[str] = ()


class Fault(NamedTuple):
    """A fault found across fields: where it is shown, the words, and the places it follows from."""

    place: tuple[str | int, ...]
    text: str
    behind: tuple[tuple[str | int, ...], ...]


class Effective(NamedTuple):
    """What holds for one component after inheritance. `params` are family fields that were set
    (clip_skip); `build` are options of `backend`."""

    backend: str
    precision: Precision
    params: dict[str, Any]
    build: dict[str, Any]


def _named(what: str, names: Iterable[str], value: str) -> str:
    if value not in (known := tuple(names)):
        raise fault(f"unknown {what} '{value}'{did_you_mean(value, known)}")
    return value


def _family(value: str, info: ValidationInfo) -> str:
    return _named("family", info.context.families, value) if info.context and info.context.families else value


def _backend(value: str, info: ValidationInfo) -> str:
    return _named("backend", info.context.backends, value) if info.context and info.context.backends else value


FamilyName = Annotated[String, AfterValidator(_family)]
BackendName = Annotated[String, AfterValidator(_backend)]


class Part(BaseModel):
    """A mapping in a recipe: frozen, no unknown fields, `null` = left out."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {k: v for k, v in data.items() if v is not None or k not in cls.model_fields}


class ShapesRecipe(Part):
    """Sizes the engines are built for: one number (static) or [min, opt, max]. Unset = the model's own."""

    batch: Size | None = Field(default=None, description="Images in one call.")
    height: Size | None = Field(default=None, description="Image height in pixels.")
    width: Size | None = Field(default=None, description="Image width in pixels.")
    tokens: Size | None = Field(
        default=None, description="Prompt tokens; a multiple of the text encoder's length (77)."
    )


class SamplerRecipe(Part):
    """A sampler: a short name, or a name of your own with a diffusers scheduler class and config fields."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: FileName = Field(description="Short name (ddim, dpmpp_2m, ...), or a name of your own if scheduler is given.")
    scheduler: String | None = Field(
        default=None, description="diffusers scheduler class, as in DPMSolverMultistepScheduler."
    )

    @property
    def config(self) -> dict[str, Any]:
        """The scheduler config fields this recipe sets over the source's own (use_karras_sigmas, ...)."""
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        if not isinstance(data, (str, Mapping, SamplerRecipe)):
            raise fault(f"expected a sampler's name, or a mapping with a name, got {shown(data)}")
        return {"name": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _known(self, info: ValidationInfo) -> SamplerRecipe:
        for key in self.config:
            if get_close_matches(key, ["scheduler"], cutoff=0.8):
                raise fault(f"unknown field '{key}', did you mean 'scheduler'?")
        if self.scheduler is not None and not self.scheduler.isidentifier():
            raise fault(f"scheduler '{self.scheduler}' is no diffusers class name")
        if info.context and info.context.samplers and self.scheduler is None and self.name not in info.context.samplers:
            near = did_you_mean(self.name, info.context.samplers)
            raise fault(
                f"unknown sampler '{self.name}'{near}"
                + ("" if "?" in near else "; or name its diffusers class as 'scheduler'")
            )
        return self


class DefaultsRecipe(Part):
    """What a request to the bundle gets where it leaves an argument open."""

    sampler: String | None = Field(default=None, description="One of `samplers`. Unset = the first of them.")
    num_inference_steps: Annotated[Whole, Field(ge=1, le=MAX_STEPS)] = Field(default=20, description="Denoising steps.")
    guidance_scale: Number = Field(default=7.5, description="Classifier-free guidance scale; <= 1 turns guidance off.")
    negative_prompt: String = Field(default="", description="Negative prompt.")
    height: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="Pixels. Unset = opt of shapes.height."
    )
    width: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="Pixels. Unset = opt of shapes.width."
    )


class ComponentRecipe(Part):
    """One component's own settings; what is unset is inherited from the recipe."""

    backend: BackendName | None = Field(default=None, description="Backend of this component.")
    precision: Precision | None = Field(default=None, description="Precision of this component.")
    clip_skip: Annotated[Whole, Field(ge=0)] | None = Field(
        default=None, description="Last text-encoder layers to leave out (text_encoder only), as diffusers counts them."
    )
    build: dict[str, Any] = Field(default_factory=dict, description="Options of this component's backend.")


class FloorRecipe(Part):
    """How close a component must come to its fp32 reference. Unset = the default of its precision."""

    min_snr_db: Number | None = Field(default=None, description="Lowest signal-to-noise ratio of any output, in dB.")
    min_cosine: Annotated[Number, Field(ge=-1, le=1)] | None = Field(
        default=None, description="Lowest cosine of any output."
    )


class VerifyRecipe(Part):
    """How a build is verified; further keys are component names with floors of their own."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, FloorRecipe]

    prompts: tuple[String, ...] | None = Field(
        default=None, min_length=1, description="Prompts to verify with. Unset = built in ones."
    )
    seed: Annotated[Whole, Field(ge=0, lt=1 << 63)] = Field(default=0, description="Seed of the verification images.")
    num_inference_steps: Annotated[Whole, Field(ge=1, le=MAX_STEPS)] | None = Field(
        default=None, description="Denoising steps of the verification images. Unset = chosen by the verify stage."
    )
    min_image_psnr_db: Number | None = Field(default=None, description="Lowest PSNR of any whole image, in dB.")
    on_fail: Literal["stop", "fallback"] = Field(
        default="stop", description="When a floor is missed: stop the build, or build that component in fp32 instead."
    )

    @property
    def floors(self) -> dict[str, FloorRecipe]:
        """Component -> floors this recipe sets."""
        return dict(self.__pydantic_extra__ or {})

    @model_validator(mode="before")
    @classmethod
    def _bare_names(cls, data: Any) -> Any:
        return _empty_for_null(data, but=cls.model_fields)


def _empty_for_null(data: Any, but: Collection[str] = ()) -> Any:
    """`components: {vae_encoder: }` lists a component with nothing of its own."""
    if not isinstance(data, Mapping):
        return data
    return {k: {} if v is None and k not in but else v for k, v in data.items()}


Components = Annotated[dict[str, ComponentRecipe], BeforeValidator(_empty_for_null)]


P = TypeVar("P", bound=Part)


def _unset(part: type[P]) -> Callable[[], P]:
    """A default factory: the section with everything left out."""
    return lambda: part.model_validate({})


class Recipe(Part):
    """What to build, from what, for what."""

    version: Literal[1] = Field(description="Version of the recipe format.")
    name: FileName = Field(description="Name of the bundle (NAME.sdc): letters, digits, '.', '_', '-'.")
    family: FamilyName = Field(description="Model family.")
    source: SourceText = Field(
        description="builtin:NAME, hf://org/name@revision, a diffusers folder or a .safetensors file. "
        "A relative path starts at the recipe's folder; in --set, at the current one."
    )
    source_config: SourceText | None = Field(
        default=None,
        description="For a single .safetensors file: the folder or hf://org/name that holds configs and tokenizer.",
    )
    backend: BackendName = Field(description="Backend of every component that names none itself.")
    precision: Precision = Field(default="fp32", description="Precision of every component that names none itself.")
    opset: Annotated[Whole, Field(ge=18, le=23)] = Field(default=20, description="ONNX opset to export, 18 to 23.")
    shapes: ShapesRecipe = Field(default_factory=_unset(ShapesRecipe), description="Sizes the engines are built for.")
    samplers: tuple[SamplerRecipe, ...] = Field(
        default_factory=lambda: tuple(SamplerRecipe(name=n) for n in ("dpmpp_2m", "euler", "ddim")),
        min_length=1,
        description="Samplers compiled into the bundle; the first is the default.",
    )
    sampler_steps: Span = Field(default=(1, 50), description="First and last number of steps compiled in.")
    defaults: DefaultsRecipe = Field(default_factory=_unset(DefaultsRecipe), description="What open arguments get.")
    components: Components = Field(
        default_factory=dict, description="Settings per component. vae_encoder is built only when listed."
    )
    build: dict[str, Any] = Field(default_factory=dict, description="Options of `backend`.")
    verify: VerifyRecipe = Field(
        default_factory=_unset(VerifyRecipe), description="Floors and prompts of the verify stage."
    )

    _folder: Path = PrivateAttr(default=Path())
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Recipe:
        # With a context the caller is `reading`, which lists these faults itself, each at its line.
        faults = list(cross_faults(self)) if info.context is None else []
        if faults:
            raise fault("; ".join(f"{'.'.join(map(str, f.place))}: {f.text}" for f in faults))
        return self

    def __eq__(self, other: object) -> bool:
        """Recipes are equal when they mean the same, wherever they were written."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def where(self, field: str) -> str:
        """Where `field` (a.b.c), or the nearest mapping around it, was written: "file:line" or "--set a.b=c"."""
        keys = field.split(".")
        near = (".".join(keys[:n]) for n in range(len(keys), 0, -1))
        return next((self._origins[name] for name in near if name in self._origins), "")

    @property
    def default_sampler(self) -> str:
        return self.defaults.sampler or self.samplers[0].name

    @property
    def shape_request(self) -> dict[str, tuple[int, int, int] | None]:
        """batch, height, width, tokens -> (min, opt, max), or None for the model's own (see families.ShapeRequest)."""
        return {side: getattr(self.shapes, side) for side in ShapesRecipe.model_fields}

    def wanted(self, required: Iterable[str]) -> tuple[str, ...]:
        """The components to build: the family's required ones, and those listed here."""
        return tuple(dict.fromkeys((*required, *self.components)))

    def effective(self, component: str) -> Effective:
        """What holds for `component`. The recipe's `build` options are inherited only by components
        that keep its backend: they mean nothing to another one."""
        own = self.components.get(component, ComponentRecipe())
        backend = own.backend or self.backend
        inherited = self.build if backend == self.backend else {}
        params = {} if own.clip_skip is None else {"clip_skip": own.clip_skip}
        return Effective(backend, own.precision or self.precision, params, {**inherited, **own.build})

    def base(self, field: str = "source") -> Path:
        """The folder that a relative path in `field` starts at: the recipe's own, or the current one for `--set`."""
        return Path() if self.where(field).startswith("--set") else self._folder

    def path(self, text: str, field: str = "source") -> Path:
        """A path written in `field`, absolute or from `base(field)`; `~` is the home folder."""
        return self.base(field) / Path(text).expanduser()

    def source_of(self, text: str | None = None) -> Source:
        """`source` (or `text`, as `source_config`) taken apart; paths are resolved against the recipe's folder."""
        source = parse_source(self.source if text is None else text)
        return source._replace(name=str(self.path(source.name))) if source.kind == "path" else source


def cross_faults(recipe: Recipe) -> Iterator[Fault]:
    """Faults between fields that are each right on their own."""
    names = [sampler.name for sampler in recipe.samplers]
    place: tuple[str | int, ...]
    for index, name in enumerate(names):
        if name in names[:index]:
            place = ("samplers", index)
            yield Fault(place, f"sampler '{name}' is listed twice; give one of them another name", (place,))
    chosen = recipe.defaults.sampler
    if chosen is not None and chosen not in names:
        place = ("defaults", "sampler")
        yield Fault(place, f"'{chosen}' is not one of samplers{did_you_mean(chosen, names)}", (place, ("samplers",)))
    first, last = recipe.sampler_steps
    steps = recipe.defaults.num_inference_steps
    if not first <= steps <= last:
        places = (("defaults", "num_inference_steps"), ("sampler_steps",))
        given = "num_inference_steps" in recipe.defaults.model_fields_set
        text = f"{steps} is outside sampler_steps [{first}, {last}]"
        yield (
            Fault(places[0], text, places)
            if given
            else Fault(places[1], f"defaults.num_inference_steps {text}", places)
        )
    for side in ("height", "width"):
        value, size = getattr(recipe.defaults, side), getattr(recipe.shapes, side)
        if value is not None and size is not None and not size[0] <= value <= size[2]:
            place = ("defaults", side)
            yield Fault(place, f"{value} is outside shapes.{side} [{size[0]} to {size[2]}]", (place, ("shapes", side)))


def known_names() -> Known:
    """The names in the tables of this installation."""
    from sdcompile.backends import BACKENDS
    from sdcompile.families import FAMILIES
    from sdcompile.samplers import SAMPLERS

    return Known(
        {name: {c: tuple(f.params.get(c, ())) for c in f.folders} for name, f in FAMILIES.items()},
        {name: backend.options for name, backend in BACKENDS.items()},
        tuple(SAMPLERS),
    )
