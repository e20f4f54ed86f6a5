"""A component's own source: one folder with a config and weights, in place of the model's own.

TAESD and other decoders are published like this: one autoencoder, without a pipeline around it. What a
folder may hold is `layout`'s business, and whether it fits the model the family's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sdcompile.errors import HostError, RecipeError
from sdcompile.steps.layout import (
    HashFile,
    Source,
    Tree,
    config_in,
    counted_weights,
    entries,
    licence_of,
    local_tree,
    placing,
    weights_in,
)

_CONFIG = "config.json"
_MODELS = Path(__file__).parent.parent / "models"


def describe(source: str, component: str, *, base: Path, offline: bool, hash_file: HashFile) -> Source:
    """What the folder `source` holds, from which `component` is made.

    builtin:NAME/FOLDER, hf://org/name[/FOLDER][@revision] or a path, which may start at `base`. Raises
    RecipeError where it is none, HostError when the hub cannot be reached or asked.
    """
    return read(open_tree(source, base, offline), component, hash_file)


def open_tree(source: str, base: Path, offline: bool) -> Tree:
    """The tree whose top level holds config and weights."""
    if source.startswith("hf://"):
        return _of_hub(source, offline)
    if source.startswith("builtin:"):
        there = sorted(f"builtin:{path.parent.relative_to(_MODELS)}" for path in _MODELS.glob("*/vae*/config.json"))
        if source not in there:
            raise RecipeError(f"{source} is not built in", f"built in: {', '.join(there)}")
        root = _MODELS / source.removeprefix("builtin:")
        whole = local_tree(root.parent, source, source, "builtin", ())
        return replace(local_tree(root, source, source, "builtin", ()), licence=licence_of(whole))
    root = base / Path(source).expanduser()
    if not root.is_dir():
        raise RecipeError(
            f"source {source} is no folder" if root.exists() else f"source {source} does not exist",
            f"a relative path starts at the recipe's folder ({base}); it holds {_CONFIG} and weights",
        )
    return local_tree(root, source, f"folder:{root.resolve().name}", "folder", ("vae",))


def _of_hub(source: str, offline: bool) -> Tree:
    from sdcompile.steps import hub

    place, at, revision = source.removeprefix("hf://").partition("@")
    org, name, *inner = place.split("/")
    folder = "/".join(inner)
    tree = hub.open_tree(f"hf://{org}/{name}{at}{revision}", offline, f"{folder}/{_CONFIG}" if folder else _CONFIG)
    return within(tree, folder) if folder else tree


def within(tree: Tree, folder: str) -> Tree:
    """What lies directly in `folder` of a hub's tree, as a tree of its own."""
    inside = {path.removeprefix(f"{folder}/"): path for path in tree.sizes if path.startswith(f"{folder}/")}
    inside = {name: path for name, path in inside.items() if "/" not in name}
    identity = f"{tree.name}/{folder}@{tree.revision}"
    return replace(
        tree, name=f"{tree.name}/{folder}", id=identity, licence=licence_of(tree),
        notes=tuple(note.replace(tree.id, identity) for note in tree.notes),
        sizes={name: tree.sizes[path] for name, path in inside.items()},
        hashes={name: tree.hashes[path] for name, path in inside.items() if path in tree.hashes},
        get=lambda name: tree.get(inside[name]),
    )  # fmt: skip


def read(tree: Tree, component: str, hash_file: HashFile) -> Source:
    """The Source of `component`, whose config and weights are the top level of `tree`.

    Raises RecipeError where it has none; HostError where the fault is that a cache lacks files.
    """
    if _CONFIG not in tree.sizes:
        vae = "vae" if "model_index.json" in tree.sizes or "vae/config.json" in tree.sizes else ""
        raise RecipeError(
            f"source {tree.name} has no {_CONFIG}" + (": it is a whole model" if vae else ""),
            f"name the folder of its decoder: {tree.name}/{vae}" if vae
            else "expected a folder as AutoencoderTiny.save_pretrained(FOLDER) writes it",
        )  # fmt: skip
    try:
        config = config_in(tree, _CONFIG)
        paths, notes = weights_in(tree, "", config)
        counted = counted_weights(tree, paths)
    except RecipeError as fault:
        if tree.partial:
            raise HostError(f"{fault.message}\nin the hub cache of this machine", tree.partial) from fault
        raise
    return Source(
        tree.id, tree.kind, tree.revision, licence_of(tree), entries(tree, (_CONFIG, *paths), hash_file),
        {component: config}, (*tree.notes, *notes), counts={component: counted} if counted else {},
        place=placing(tree, _CONFIG),
    )  # fmt: skip
