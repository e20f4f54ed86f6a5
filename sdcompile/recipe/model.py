"""What a person writes: the fields of a recipe, what each may be, and how they fit together.

An unset field means "inherit"; `null` is the same as leaving a field out. Names of families,
backends, components and samplers are checked against the tables handed over as validation
context (`Known`); without a context only the structure is checked. This file knows no YAML.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from sdcompile.recipe.compression import (
    ACCEPT_IF,
    CalibrateRecipe,
    CastRecipe,
    PruneAcceptRecipe,
    PruneParams,
    QuantizeRecipe,
    prompts_of,
    prune_value,
)
from sdcompile.recipe.fields import (
    ComponentSourceText,
    FileName,
    Part,
    Source,
    SourceText,
    Span,
    Whole,
    did_you_mean,
    fault,
    parse_source,
)
from sdcompile.recipe.generation import Profiles
from sdcompile.recipe.names import BackendName, FamilyName
from sdcompile.recipe.sections import DefaultsRecipe, SamplerRecipe, ShapesRecipe, VerifyRecipe, empty_for_null
from sdcompile.recipe.stepcache import StepCacheRecipe, base_of, cached
from sdcompile.recipe.targets import TargetComponentRecipe, TargetRecipe, target_faults
from sdcompile.recipe.widths import Widths, widths_of
from sdcompile.runtime.offer import Offer
from sdcompile.runtime.options import Options
from sdcompile.spec import Precision


class Fault(NamedTuple):
    """A fault found across fields: where it is shown, the words, and the places it follows from."""

    place: tuple[str | int, ...]
    text: str
    behind: tuple[tuple[str | int, ...], ...]


class Effective(NamedTuple):
    """What holds for one component after inheritance. `params` are family fields that were set
    (clip_skip, step_cache's depth); `build` are options of `backend`."""

    backend: str
    precision: Precision
    params: dict[str, Any]
    build: dict[str, Any]


class ComponentRecipe(Part):
    """One component's own settings; what is unset is inherited from the recipe."""

    backend: BackendName | None = Field(default=None, description="Backend of this component.")
    precision: Precision | None = Field(default=None, description="Precision of this component.")
    clip_skip: Annotated[Whole, Field(ge=0)] | None = Field(
        default=None, description="Last text-encoder layers to leave out (text_encoder only), as diffusers counts them."
    )
    source: ComponentSourceText | None = Field(
        default=None,
        description="Another decoder (vae_decoder only), AutoencoderTiny or AutoencoderKL: builtin:NAME/FOLDER, "
        "hf://org/name[/FOLDER][@revision] or a folder; relative paths as for the recipe's `source`.",
    )
    build: dict[str, Any] = Field(default_factory=dict, description="Options of this component's backend.")
    prune: Annotated[PruneParams, BeforeValidator(prune_value)] = Field(
        default_factory=dict,
        description="Passes of the prune stage, each with its parameters, as in {heads: {...}}; and accept_if.",
    )
    quantize: QuantizeRecipe | None = Field(
        default=None, description="How this component is quantized, over what the recipe's `quantize` says."
    )
    step_cache: StepCacheRecipe | None = Field(
        default=None,
        description="Reuse deep features on some steps (unet only): adds a component unet_cached, which inherits "
        "what is set here and may be listed with settings of its own.",
    )
    widths: Widths | None = Field(
        default=None,
        description="Further widths of the denoiser (unet only), the widest first, each with its passes as under "
        "`prune`, in {w75: {channels: {ratio: 0.25}}}: adds a component unet_w75, which inherits what is set here but "
        "for `prune`, and may be listed with settings of its own.",
    )
    cast: CastRecipe | None = Field(
        default=None, description="What stays in float32 where this component is cast to fp16 or bf16."
    )

    def over(self, base: ComponentRecipe) -> ComponentRecipe:
        """These settings, and those of `base` where one is not set here."""
        same_backend = self.backend in (None, base.backend)
        quantize = self.quantize or base.quantize
        if self.quantize is not None and base.quantize is not None:
            quantize = self.quantize.over(base.quantize)
        return self.model_copy(
            update={
                "backend": self.backend or base.backend,
                "precision": self.precision or base.precision,
                "build": {**base.build, **self.build} if same_backend else self.build,
                "prune": self.prune or base.prune,
                "quantize": quantize,
                "cast": self.cast or base.cast,
                "step_cache": self.step_cache or base.step_cache,
            }
        )

    def in_target(self, own: TargetComponentRecipe) -> ComponentRecipe:
        """These settings with those a target has of its own laid over them."""
        given = {name: value for name in own.model_fields_set if (value := getattr(own, name)) is not None}
        if own.quantize and self.quantize:
            given["quantize"] = own.quantize.over(self.quantize)
        return self.model_copy(update=given)


Components = Annotated[dict[str, ComponentRecipe], BeforeValidator(empty_for_null)]


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
    backend: BackendName | None = Field(
        default=None, description="Backend of every component that names none itself. Either this or `targets`."
    )
    targets: tuple[TargetRecipe, ...] | None = Field(
        default=None,
        min_length=1,
        description="Engines for several places in one bundle, the preferred first: names of backends, with a compute "
        "capability where one engine is not for all GPUs (tensorrt_rtx:sm89), or mappings.",
    )
    precision: Precision = Field(default="fp32", description="Precision of every component that names none itself.")
    opset: Annotated[Whole, Field(ge=18, le=23)] = Field(
        default=20, description="ONNX opset to export, 18 to 23. Unset = 20, or 22 for what is cast to bf16."
    )
    shapes: ShapesRecipe = Field(default_factory=_unset(ShapesRecipe), description="Sizes the engines are built for.")
    samplers: tuple[SamplerRecipe, ...] = Field(
        default_factory=lambda: tuple(SamplerRecipe(name=n) for n in ("dpmpp_2m", "euler", "ddim")),
        min_length=1,
        description="Samplers compiled into the bundle; the first is the default.",
    )
    sampler_steps: Span = Field(default=(1, 50), description="First and last number of steps compiled in.")
    defaults: DefaultsRecipe = Field(default_factory=_unset(DefaultsRecipe), description="What open arguments get.")
    profiles: Profiles | None = Field(
        default=None, description="Named sets of options. Unset = draft, balanced and quality, by their steps."
    )
    components: Components = Field(
        default_factory=dict, description="Settings per component. vae_encoder is built only when listed."
    )
    build: dict[str, Any] = Field(default_factory=dict, description="Options of `backend`.")
    calibrate: CalibrateRecipe = Field(
        default_factory=_unset(CalibrateRecipe), description="Where samples come from, for passes that want some."
    )
    quantize: QuantizeRecipe | None = Field(
        default=None, description="How components of precision int8 are quantized, unless they say it themselves."
    )
    verify: VerifyRecipe = Field(
        default_factory=_unset(VerifyRecipe), description="Floors and prompts of the verify stage."
    )

    _folder: Path = PrivateAttr(default=Path())
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Recipe:
        # With a context the caller is `reading`, which lists these faults itself, each at its line.
        faults = [*cross_faults(self), *_target_faults(self)] if info.context is None else []
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
        shallow = (cached(name) for name, own in self.components.items() if own.step_cache)
        narrow = (name for name, _, _ in widths_of(self.components))
        return tuple(dict.fromkeys((*required, *self.components, *shallow, *narrow)))

    @property
    def widths(self) -> dict[str, tuple[str, str]]:
        """Component of a width -> the component it is cut from, and the width's name; in the order written."""
        return {name: (base, width) for name, base, width in widths_of(self.components)}

    def settings(self, component: str) -> ComponentRecipe:
        """What the recipe sets for `component`; a shallow one inherits from the denoiser it stands in for, a width
        from the full one, whose source it is cut from by passes of its own."""
        if component in self.widths:
            full = self.components[self.widths[component][0]]
            own = self.components.get(component, ComponentRecipe()).over(full)
            assert full.widths is not None
            return own.model_copy(update={"prune": full.widths[self.widths[component][1]]})
        own, base = self.components.get(component, ComponentRecipe()), base_of(component)
        return own if base is None else own.over(self.components.get(base, ComponentRecipe()))

    def effective(self, component: str) -> Effective:
        """What holds for `component`. The recipe's `build` options are inherited only by components
        that keep its backend: they mean nothing to another one."""
        own = self.settings(component)
        backend = own.backend or self.backend
        assert backend is not None, "a recipe of several targets is looked at target by target (by_target)"
        inherited = self.build if backend == self.backend else {}
        params = {} if own.clip_skip is None else {"clip_skip": own.clip_skip}
        if own.step_cache is not None:
            params["step_cache_depth"] = own.step_cache.depth
        return Effective(backend, own.precision or self.precision, params, {**inherited, **own.build})

    @property
    def component_sources(self) -> dict[str, str]:
        """Component -> its own source, of those that name one."""
        return {name: own.source for name, own in self.components.items() if own.source is not None}

    def by_target(self) -> dict[str, Recipe]:
        """Target -> the recipe of that target alone, in the order written; {"": this one} where it has no targets."""
        return {"": self} if self.targets is None else {target.name: self._of(target) for target in self.targets}

    def _of(self, target: TargetRecipe) -> Recipe:
        names = dict.fromkeys((*self.components, *target.components))
        components = {
            name: self.components.get(name, ComponentRecipe()).in_target(
                target.components.get(name, TargetComponentRecipe())
            )
            for name in names
        }
        own = {
            "backend": target.backend, "precision": target.precision or self.precision, "build": target.build,
            "verify": target.verify.over(self.verify) if target.verify else self.verify,
        }  # fmt: skip
        return self.model_copy(update={**own, "components": components, "targets": None})

    def field_of(self, target: str, field: str) -> str:
        """Where a field of the recipe `by_target()[target]` is set in this one: targets.1.precision, or precision."""
        if self.targets is None:
            return field
        place = [one.name for one in self.targets].index(target)
        own = f"targets.{place}.{field}"
        if own not in self._origins and field in self._origins:
            return field
        return own

    def pruning(self, component: str) -> PruneParams:
        """Pass of the prune stage -> its parameters, for `component`."""
        return {name: told for name, told in self.settings(component).prune.items() if name != ACCEPT_IF}

    def accepted_pruned(self, component: str) -> float | None:
        """How many times as fast as the unpruned `component` the pruned one must be; None = it need not be faster."""
        told = self.settings(component).prune.get(ACCEPT_IF)
        return PruneAcceptRecipe.model_validate(told).speedup if told is not None else None

    def place_of_pruning(self, component: str) -> str:
        """The field that names those passes."""
        base, width = self.widths.get(component, (component, ""))
        return f"components.{base}.widths.{width}" if width else f"components.{component}.prune"

    def quantizing(self, component: str) -> QuantizeRecipe:
        """How `component` is quantized, if its precision asks for it."""
        default = self.quantize or QuantizeRecipe()
        own = self.settings(component).quantize
        return own.over(default) if own else default

    def calibration_prompts(self) -> tuple[str, ...] | None:
        """The prompts of `calibrate`, read from its file where it names one; None = the built in ones."""
        field, file = "calibrate.prompts_file", self.calibrate.prompts_file
        return prompts_of(self.calibrate, self.path(file, field) if file else None, self.where(field))

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
    plain = [sampler.name for sampler in recipe.samplers if sampler.fit is None]
    for index, sampler in enumerate(recipe.samplers):
        if sampler.base is not None and sampler.base not in plain:
            place = ("samplers", index, "base")
            yield Fault(place, f"'{sampler.base}' is not one of samplers{did_you_mean(sampler.base, plain)}", (place,))
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
    yield from _not_compiled(recipe)
    for side in ("height", "width"):
        value, size = getattr(recipe.defaults, side), getattr(recipe.shapes, side)
        if value is not None and size is not None and not size[0] <= value <= size[2]:
            place = ("defaults", side)
            yield Fault(place, f"{value} is outside shapes.{side} [{size[0]} to {size[2]}]", (place, ("shapes", side)))


def _not_compiled(recipe: Recipe) -> Iterator[Fault]:
    """Samplers and step counts that profiles, and stages among the defaults, ask for and the recipe does not build."""
    first, last = recipe.sampler_steps
    samplers: dict[str, Collection[int]] = {
        sampler.name: range(first, last + 1) if sampler.num_inference_steps is None else (sampler.num_inference_steps,)
        for sampler in recipe.samplers
    }
    own = recipe.defaults
    offer = Offer(samplers, recipe.default_sampler, own.num_inference_steps)
    asked: list[tuple[tuple[str, ...], Options]] = []
    if own.stages is not None:
        asked.append((("defaults",), Options(stages=own.stages)))
    for name, options in (recipe.profiles or {}).items():
        # What a profile leaves open is the defaults' business, and told there.
        if {"sampler", "stages", "num_inference_steps"} & set(options):
            asked.append((("profiles", name), Options.of({"stages": own.stages, **options})))
    for place, chosen in asked:
        for option, text in offer.faults(chosen):
            yield Fault((*place, option), text, (place, ("samplers",), ("sampler_steps",), ("defaults",)))


def _target_faults(recipe: Recipe) -> Iterator[Fault]:
    """Faults of `backend` and `targets` together; `reading` finds them in the data as written."""
    for place, text in target_faults(recipe.model_dump(exclude_unset=True)):
        yield Fault(place, text, (place,))
