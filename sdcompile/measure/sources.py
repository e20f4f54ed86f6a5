"""The model a bundle was built from, found again for what is measured against it."""

from __future__ import annotations

from pathlib import Path

from sdcompile import bundle
from sdcompile.errors import RecipeError
from sdcompile.run import source_of


def diffusers_folder(folder: Path, named: str | None) -> Path:
    """A diffusers folder on this disk that peers can load the bundle's model from.

    Raises RecipeError when the source is a single file or not on this disk.
    """
    source = source_of(folder, bundle.read(folder), named)
    if source.startswith("builtin:"):
        from sdcompile import models

        return Path(models.__file__).parent / source.removeprefix("builtin:")
    if source.startswith("hf://"):
        return _snapshot(source)
    return Path(source).expanduser()


def _snapshot(source: str) -> Path:
    """The hub's local snapshot, which a build has filled."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, _, revision = source.removeprefix("hf://").partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise RecipeError(
            f"{source} is not on this disk", f"huggingface-cli download {name}, or name a folder: --source FOLDER"
        ) from error
