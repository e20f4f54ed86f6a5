"""Samplers: those that are read off diffusers' schedulers, and those that are fitted to a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdcompile.plan import memory, stepcaching
from sdcompile.plan.choice import Choice
from sdcompile.plan.draft import Draft
from sdcompile.plan.verification import default_size
from sdcompile.plan.widths import widths
from sdcompile.recipe import Recipe
from sdcompile.samplers import SAMPLERS
from sdcompile.spec import PIPELINE, Shapes
from sdcompile.steps import fit_prompts

if TYPE_CHECKING:
    from sdcompile.steps.layout import Source


def samplers(recipe: Recipe) -> list[dict[str, Any]]:
    """Every sampler as diffusers knows it; what the recipe sets wins over what the short name fixes."""
    rows = []
    for sampler in recipe.samplers:
        if sampler.fit is not None:
            continue
        row = SAMPLERS.get(sampler.name)
        fixed = row.config if row and sampler.scheduler in (None, row.scheduler) else {}
        scheduler = sampler.scheduler or (row.scheduler if row else sampler.name)
        rows.append({"name": sampler.name, "scheduler": scheduler, "config": {**fixed, **sampler.config}})
    return rows


def fitting(
    draft: Draft, recipe: Recipe, chosen: Mapping[str, Choice], shapes: Shapes, inputs: Mapping[str, str], tables: str
) -> str:
    """The step that adds fitted samplers to the compiled `tables`; `tables` itself where the recipe has none.

    inputs: checkpoints, assets and tokenizer.
    """
    fits = _fits(recipe, draft.source)
    if not fits:
        return tables
    family = draft.family
    params = {
        "family": family.name, "facts": draft.without_parts(family.facts(draft.source.configs)),
        "num_inference_steps": None, "guidance_scale": recipe.defaults.guidance_scale,
        "components": {
            name: stepcaching.plain(chosen[name].module_params) for name in ("text_encoder", family.denoiser)
        },
        "sampler": fits[0]["name"], "size": default_size(recipe, shapes), "fits": fits,
    }  # fmt: skip
    size = draft.source.fp32_bytes(family.folders[family.denoiser])
    return draft.add(
        PIPELINE, "fit", {**draft.without_parts(inputs), "tables": tables}, params, shapes=shapes,
        memory=memory.needed(memory.RECORD, size), disk=4 << 20,
    )  # fmt: skip


def _fits(recipe: Recipe, source: Source) -> list[dict[str, Any]]:
    """Every fitted sampler: its base as diffusers knows it, and the texts it is fitted to."""
    bases, rows = {row["name"]: row for row in samplers(recipe)}, []
    for sampler in recipe.samplers:
        if (fit := sampler.fit) is None or sampler.base is None:
            continue
        texts = {
            key: fit_prompts.drawn(source.id, asked, fit.seed, judging=key == "held_out")
            if isinstance(asked, int) else list(asked)
            for key, asked in (("prompts", fit.prompts), ("held_out", fit.held_out))
        }  # fmt: skip
        scale = recipe.defaults.guidance_scale if fit.guidance_scale is None else fit.guidance_scale
        rows.append({
            **bases[sampler.base], "name": sampler.name, "num_inference_steps": sampler.num_inference_steps,
            "guidance_scale": scale, "teacher_steps": fit.teacher_steps, "iterations": fit.iterations,
            "seed": fit.seed, **texts,
        })  # fmt: skip
    return rows


def profiles(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The recipe's own, or fewer and more steps than the default, as far as they are compiled."""
    if recipe.profiles is not None:
        return dict(recipe.profiles)
    (first, last), steps = recipe.sampler_steps, recipe.defaults.num_inference_steps
    draft, quality = max(first, round(0.4 * steps)), min(last, round(1.5 * steps))
    # A fitted sampler has one number of steps; with others its base is asked.
    base = next((s.base for s in recipe.samplers if s.name == recipe.default_sampler), None)
    other = {} if base is None else {"sampler": base}
    # Fewer steps, and less of each: the last width is the narrowest.
    narrow = {"unet_width": widths(recipe)[-1]} if recipe.widths else {}
    return {
        "draft": {**other, **narrow, "num_inference_steps": draft}, "balanced": {},
        "quality": {**other, "num_inference_steps": quality},
    }  # fmt: skip
