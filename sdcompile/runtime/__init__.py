"""Running bundles: prompts in, images out, with numpy, tokenizers, pillow and one engine library.

`load(bundle)` gives a pipeline with diffusers' calling convention. The room knows no compiler
room and never imports torch, diffusers or transformers; its modules are imported on first use.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sdcompile.errors import SdcompileWarning

if TYPE_CHECKING:
    from sdcompile.runtime.pipeline import Pipeline

__all__ = ["SdcompileWarning", "load"]


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    cache: str | Path | None = None,
    memory: Literal["auto", "low", "high"] = "auto",
    verify_files: bool = True,
    prompt_cache: str | Path | None = None,
    prompt_cache_bytes: int = 256 << 20,
    image_cache: str | Path | None = None,
    image_cache_bytes: int = 1 << 30,
    target: str | None = None,
) -> Pipeline:
    """Open the bundle folder `path`; engines themselves are opened when a request first needs them.

    threads       worker threads per engine; None = the library's choice
    cache         folder for compiled-model caches; None = no cache, but for kernels that TensorRT-RTX makes on the
                  GPU: they are kept in the user's cache folder (XDG_CACHE_HOME or ~/.cache, sdcompile)
    memory        "low": at most one engine is open at a time, so that the peaks of text encoder,
                  denoiser and VAE do not add up (engines are opened anew for every request);
                  "high": engines stay open; "auto": "low" when the engines' files times 1.5 and
                  1 GiB exceed the available memory
    verify_files  compare the sha256 of every file that may be read with the manifest
    prompt_cache  folder for prompt embeddings, shared by processes and kept below prompt_cache_bytes;
                  None = they are remembered by this pipeline alone
    image_cache   folder for finished images, likewise: a request with the same seed gets the same bytes at once
    target        which engines to run, of a bundle of several targets; None = the first one listed that this
                  machine can run. The pipeline tells which (`target`) and the reason (`why`)

    Raises BundleError when the bundle is damaged, incomplete or too new, HostError when this
    machine lacks what an engine needs, RecipeError for an unknown value of `memory` or `target`.
    """
    from sdcompile.runtime.opening import open_bundle

    folder = Path(cache) if cache is not None else None
    opened = open_bundle(Path(path), threads, folder, memory, verify_files, target)
    if prompt_cache is not None:
        opened.keep_prompts(Path(prompt_cache), prompt_cache_bytes)
    if image_cache is not None:
        opened.keep_images(Path(image_cache), image_cache_bytes)
    return opened
