"""The model a bundle was built from, found again for what is measured against it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdcompile import bundle
from sdcompile.errors import RecipeError
from sdcompile.recheck import sources_of


def folders(folder: Path, named: Sequence[str]) -> dict[str, Path]:
    """Folders on this disk that peers can load the bundle's model from: "source", and a component's own.

    Raises RecipeError when one is not on this disk.
    """
    return {name: _folder(source) for name, source in sources_of(folder, bundle.read(folder), named).items()}


def _folder(source: str) -> Path:
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

    place, _, revision = source.removeprefix("hf://").partition("@")
    org, repo, *inner = place.split("/")
    name = f"{org}/{repo}"
    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True), *inner)
    except LocalEntryNotFoundError as error:
        raise RecipeError(
            f"{source} is not on this disk", f"huggingface-cli download {name}, or name a folder: --source FOLDER"
        ) from error
