"""Recipes outward: as plain data, as a JSON schema for editors, and as the text of a new file."""

from __future__ import annotations

import json
from typing import Any

from sdcompile.recipe.compression import ACCEPT_IF, PruneAcceptRecipe
from sdcompile.recipe.known import Known, known_names
from sdcompile.recipe.model import Recipe
from sdcompile.recipe.sections import VerifyRecipe
from sdcompile.recipe.targets import CAPABILITIES

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def dump(recipe: Recipe) -> dict[str, Any]:
    """The recipe with its defaults and overlays, as JSON-able data in one fixed order.

    `Recipe.model_validate(dump(recipe))` gives an equal recipe (but for its folder).
    """
    return recipe.model_dump(mode="json", exclude_none=True)


def schema(known: Known | None = None) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe, with the names this installation knows."""
    known = known or known_names()
    result = {"$schema": SCHEMA_DIALECT, **Recipe.model_json_schema(mode="validation")}
    result["title"] = "sdcompile recipe"
    parts = result["$defs"]
    components = list(dict.fromkeys(c for fields in known.families.values() for c in fields))
    fields = result["properties"]
    fields["family"]["enum"] = list(known.families)
    slim = [c for row in known.families.values() for c, own in row.items() if "widths" in own]
    widths = f"^({'|'.join(dict.fromkeys(slim))})_[A-Za-z0-9]+$"
    named = {"anyOf": [{"enum": components}, {"pattern": widths}]} if slim else {"enum": components}
    fields["components"]["propertyNames"] = named
    parts["TargetRecipe"]["properties"]["components"]["propertyNames"] = named
    fields["backend"] = {"enum": list(known.backends), "description": fields["backend"]["description"]}
    for part in ("ComponentRecipe", "TargetComponentRecipe"):
        for branch in parts[part]["properties"]["backend"]["anyOf"]:
            if branch.get("type") == "string":
                branch["enum"] = list(known.backends)
    capable = [b for b, model in known.backends.items() if model and CAPABILITIES in model.model_fields]
    target = {"type": "string", "pattern": f"^({'|'.join(known.backends)}|({'|'.join(capable)}):[a-z0-9_]+)$"}
    parts["TargetRecipe"]["properties"]["backend"] |= target
    fields["targets"] = {
        **{key: value for key, value in fields["targets"].items() if key not in ("anyOf", "default")},
        "type": "array", "minItems": 1, "items": {"anyOf": [target, {"$ref": "#/$defs/TargetRecipe"}]},
    }  # fmt: skip
    result["oneOf"] = [{"required": ["backend"]}, {"required": ["targets"]}]
    fields["samplers"]["items"] = {
        "anyOf": [{"enum": list(known.samplers)}, {"$ref": "#/$defs/SamplerRecipe"}],
        "description": "A short name, or {name, scheduler, config fields of the diffusers scheduler}.",
    }
    floors = {name: {"$ref": "#/$defs/FloorRecipe"} for name in components if name not in VerifyRecipe.model_fields}
    parts["VerifyRecipe"]["properties"].update(floors)
    parts["TargetVerifyRecipe"]["properties"].update(floors)
    for part in ("VerifyRecipe", "TargetVerifyRecipe"):
        parts[part] |= {"patternProperties": {widths: {"$ref": "#/$defs/FloorRecipe"}}} if slim else {}
        parts[part]["additionalProperties"] = False
    _add_passes(parts, known)
    return result


def _add_passes(parts: dict[str, Any], known: Known) -> None:
    """Parameters of passes, as the tables have them: `prune` by pass, `quantize` of every quantization pass."""
    prune = {name: _inlined(model.model_json_schema()) for name, model in known.prune.items()}
    passes = {"properties": prune, "additionalProperties": False}
    accept = {ACCEPT_IF: _inlined(PruneAcceptRecipe.model_json_schema())}
    parts["ComponentRecipe"]["properties"]["prune"] |= {**passes, "properties": {**prune, **accept}}
    for branch in parts["ComponentRecipe"]["properties"]["widths"]["anyOf"]:
        if branch.get("type") == "object":
            branch["additionalProperties"] = {"type": "object", **passes}
    for model in dict.fromkeys(model for row in known.quantize.values() for model in row.values()):
        parts["QuantizeRecipe"]["properties"] |= _inlined(model.model_json_schema())["properties"]
    parts["QuantizeRecipe"]["additionalProperties"] = False


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its own `$defs` put where they are referred to."""
    parts = schema.pop("$defs", {})

    def put(value: Any) -> Any:
        if isinstance(value, dict):
            name = str(value.get("$ref", "")).removeprefix("#/$defs/")
            rest = {key: put(item) for key, item in value.items() if key != "$ref"}
            return {**put(parts[name]), **rest} if name in parts else rest
        return [put(item) for item in value] if isinstance(value, list) else value

    inlined: dict[str, Any] = put(schema)
    return inlined


_STARTER = """\
# sdcompile build {name}.yaml
version: 1
name: {name}
family: {family}
# builtin:tiny, hf://org/name@revision, a diffusers folder (relative to this file) or a .safetensors file
source: {source}
backend: {backend}             # sdcompile doctor lists what this machine has
precision: {precision}         # fp32 | fp16 | bf16 | int8

# Images per call and pixels: one number (static) or [min, opt, max]. Unset: one image of the model's own size.
# shapes: {{batch: [1, 1, 4], height: 512, width: [512, 512, 768]}}

# The first is the default. A mapping sets fields of the diffusers scheduler:
#   - {{name: dpmpp_2m_karras, scheduler: DPMSolverMultistepScheduler, use_karras_sigmas: true}}
samplers: [dpmpp_2m, euler, ddim]
defaults: {{num_inference_steps: 20, guidance_scale: 7.5}}

# Instead of backend, engines for several places in one bundle, the preferred first:
# targets: [tensorrt_rtx:sm89, {{backend: openvino, precision: bf16}}, onnxruntime]

# Per component: backend, precision, build options; clip_skip for text_encoder. vae_encoder is built when listed.
# components: {{vae_decoder: {{precision: fp32}}}}

# How close to the fp32 reference each component must come; on_fail: fallback rebuilds in fp32 instead of stopping,
# on_nan: fallback only where a component overflows or gives NaN or one colour.
# verify: {{unet: {{min_snr_db: 30}}, on_fail: stop, on_nan: fallback}}
"""


def starter(family: str, backend: str, precision: str, source: str, name: str | None = None) -> str:
    """The text of a new recipe, with comments on what else may be set."""
    return _STARTER.format(
        name=name or f"{family}-{backend}-{precision}",
        family=family,
        backend=backend,
        precision=precision,
        # JSON strings are YAML strings: quoted only where a plain one would be read otherwise.
        source=source if _is_plain(source) else json.dumps(source, ensure_ascii=False),
    )


def _is_plain(text: str) -> bool:
    from sdcompile.recipe.yamltext import read

    parsed = read(f"a: {text}\n")
    return not parsed.broken and not parsed.faults and parsed.data == {"a": text}
