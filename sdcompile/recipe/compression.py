"""What a recipe says of making a model smaller: pruning, calibration, quantization, casting.

The parameters of each pass are the pass's own (`PASSES[...].params`); this file holds only what the
plan itself must know. It knows no pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from sdcompile.errors import RecipeError
from sdcompile.recipe.fields import MAX_STEPS, Number, Part, String, Truth, Whole, fault, shown

PruneParams = dict[str, dict[str, Any]]
"""Name of a pass of the prune stage -> its parameters."""

Rest = Literal["fp32", "fp16", "bf16"]


def _nonempty(prompt: str) -> str:
    if not prompt.strip():
        raise fault("an empty prompt shows calibration nothing; write one, or leave `prompts` out for built in ones")
    return prompt


Prompt = Annotated[String, AfterValidator(_nonempty)]


class CalibrateRecipe(Part):
    """Denoising trajectories of the fp32 reference from which passes take their samples: never those of `verify`."""

    prompts: tuple[Prompt, ...] | None = Field(
        default=None,
        min_length=1,
        description="Prompts to record: a list, or `prompts_file`. Unset = built in ones (more than 128).",
    )
    prompts_file: String | None = Field(
        default=None, description="A text file with one prompt per line; relative paths as for `source`."
    )
    seed: Annotated[Whole, Field(ge=0, lt=1 << 63)] = Field(
        default=1 << 20, description="Seed of the first image; each further image has the next one."
    )
    images: Annotated[Whole, Field(ge=4, le=4096)] = Field(
        default=32,
        description="Trajectories to run, over the prompts in order. One in four is held out: passes are "
        "judged by it and never fitted to it, but that recovery keeps the weights that do best on it. One in five is "
        "unguided, two in seven the least or largest size.",
    )
    num_inference_steps: Annotated[Whole, Field(ge=1, le=MAX_STEPS)] = Field(
        default=10, description="Denoising steps of each."
    )
    max_samples: Annotated[Whole, Field(ge=4, le=100_000)] = Field(
        default=128, description="Calls to keep of each component, spread evenly over trajectories and timesteps."
    )
    pictures: String | None = Field(
        default=None,
        description="A folder of pictures (PNG, JPEG, WebP) that `prune: {recover: ...}` learns on besides "
        "trajectories; NAME.txt beside one is its caption. Relative paths as for `source`.",
    )

    @model_validator(mode="after")
    def _one_list(self) -> CalibrateRecipe:
        if self.prompts is not None and self.prompts_file is not None:
            raise fault("prompts and prompts_file are both given; leave one of them out")
        return self


class AcceptRecipe(Part):
    """What the quantized engine must bring on this machine to be kept."""

    speedup: Annotated[Number, Field(ge=0)] | None = Field(
        default=None,
        description="Least ratio of processor time, unquantized over quantized; below it the component is built "
        "unquantized (in `rest`) and the bundle says so. 0: the ratio is measured and told, and all is kept.",
    )
    groups: Truth = Field(
        default=True,
        description="Where the engine tells what it spends where: leave groups of layers in `rest` that take longer in "
        "int8, if that saves a hundredth of a call, and race again. Not where `speedup` is 0.",
    )


ACCEPT_IF = "accept_if"
"""Key beside the passes of `prune`."""


class PruneAcceptRecipe(Part):
    """What the pruned engine must bring on this machine to be kept."""

    speedup: Annotated[Number, Field(ge=0)] = Field(
        description="Least ratio of processor time, unpruned over pruned, both in the precision of what is not int8; "
        "below it the component is built unpruned and the bundle says so. 0: the ratio is measured and told."
    )


class CastRecipe(Part):
    """What stays in float32 where a component is cast to fp16 or bf16 (parameters of passes.cast)."""

    keep_fp32: tuple[String, ...] | None = Field(
        default=None,
        description="Operators (`Softmax`), nodes (`decoder.conv_out/*`) or modules (`up_blocks.3.**.norm1`) to "
        "keep in float32. A pattern that matches nothing is an error.",
    )
    from_samples: Truth | None = Field(
        default=None,
        description="fp16 only: run calibration samples, and keep what makes or reads a value beyond fp16. Unset = no.",
    )
    headroom: Annotated[Number, Field(ge=1)] | None = Field(
        default=None, description="Beyond means more than 65504 / headroom. Unset = 2."
    )
    max_samples: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="Samples that ranges are measured on. Unset = 32."
    )

    @property
    def params(self) -> dict[str, Any]:
        """The fields that are set here."""
        return {name: value for name, value in self.model_dump().items() if value is not None}

    @model_validator(mode="after")
    def _measured(self) -> CastRecipe:
        given = [name for name in ("headroom", "max_samples") if getattr(self, name) is not None]
        if given and not self.from_samples:
            raise fault(f"{given[0]} says how samples are judged, and from_samples is not set")
        return self


class QuantizeRecipe(Part):
    """How components of precision int8 are quantized; further fields are those of the quantization pass."""

    model_config = ConfigDict(extra="allow", frozen=True)

    rest: Rest | None = Field(
        default=None, description="Precision of what stays unquantized. Unset = the backend's choice."
    )
    accept_if: AcceptRecipe | None = Field(
        default=None, description="When the quantized engine is kept. Unset: always."
    )

    @property
    def params(self) -> dict[str, Any]:
        """The fields of the quantization pass that are set here."""
        return {k: v for k, v in (self.model_extra or {}).items() if v is not None}

    def over(self, default: QuantizeRecipe) -> QuantizeRecipe:
        """These fields, and those of `default` where one is not set here."""
        accept = {**_set(default.accept_if), **_set(self.accept_if)}
        return QuantizeRecipe.model_validate(
            {**_set(default), **_set(self), **({"accept_if": accept} if accept else {})}
        )


def _set(part: Part | None) -> dict[str, Any]:
    """The fields that are set; a default counts as such only where it was written."""
    told = part.model_dump(exclude_unset=True) if part is not None else {}
    return {name: value for name, value in told.items() if value is not None}


def prune_value(value: Any) -> Any:
    """`prune: {heads: }` means the pass `heads` with all its defaults; `accept_if: ` means none."""
    if not isinstance(value, dict):
        return value
    return {
        name: {} if params is None else params
        for name, params in value.items()
        if not (name == ACCEPT_IF and params is None)
    }


def prompts_of(part: CalibrateRecipe, path: Path | None, where: str) -> tuple[str, ...] | None:
    """The prompts to calibrate with; None = the built in ones. `path` is `prompts_file` as a path.

    Raises RecipeError, with the place `where`, when the file cannot be read or holds no prompt.
    """
    if path is None:
        return part.prompts
    at = f"{where}: calibrate.prompts_file" if where else "calibrate.prompts_file"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{at}: cannot read {shown(str(path))}: {error}", "name a UTF-8 text file") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise RecipeError(f"{at}: {path} holds no prompt", "write one prompt per line")
    return prompts
