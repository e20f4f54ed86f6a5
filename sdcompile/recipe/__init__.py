"""Recipes: the YAML document a person writes, checked, as a frozen value.

`load` reads a file and its `--set` overlays and reports every fault at once; `schema` is the
JSON schema for editors; `dump` is a recipe as plain data; `starter` is the text of a new one.
This room knows which names there are (families, backends, samplers) but not what they mean:
whether a combination can be built is the plan's to say. YAML is known only here.
"""

from __future__ import annotations

from sdcompile.recipe.compression import AcceptRecipe, CalibrateRecipe, QuantizeRecipe
from sdcompile.recipe.documents import load_document
from sdcompile.recipe.fields import Source
from sdcompile.recipe.known import Known, known_names
from sdcompile.recipe.model import ComponentRecipe, Effective, Recipe
from sdcompile.recipe.reading import load
from sdcompile.recipe.sections import DefaultsRecipe, FloorRecipe, SamplerRecipe, ShapesRecipe, VerifyRecipe
from sdcompile.recipe.targets import TargetComponentRecipe, TargetRecipe, TargetVerifyRecipe
from sdcompile.recipe.writing import dump, schema, starter

__all__ = [
    "AcceptRecipe",
    "CalibrateRecipe",
    "ComponentRecipe",
    "DefaultsRecipe",
    "Effective",
    "FloorRecipe",
    "Known",
    "QuantizeRecipe",
    "Recipe",
    "SamplerRecipe",
    "ShapesRecipe",
    "Source",
    "TargetComponentRecipe",
    "TargetRecipe",
    "TargetVerifyRecipe",
    "VerifyRecipe",
    "dump",
    "known_names",
    "load",
    "load_document",
    "schema",
    "starter",
]
