"""sdcompile: diffusion models in, verified deployable engines out.

`sdcompile.load(bundle)` opens a bundle and returns a pipeline with diffusers' calling
convention. Nothing heavy is imported until it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from sdcompile.runtime.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(bundle: str | Path, **options: Any) -> Pipeline:
    """Open the bundle folder `bundle` and return its pipeline (see `sdcompile.runtime.load`)."""
    from sdcompile.runtime import load as load_bundle

    return load_bundle(bundle, **options)
