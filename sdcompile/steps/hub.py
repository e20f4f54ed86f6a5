"""The Hugging Face hub as a source: a commit, its files, and getting one onto this disk.

The only room that knows huggingface_hub. It downloads nothing but what is asked for, one file
at a time into the hub's own cache, and never shows a token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdcompile.errors import HostError, RecipeError
from sdcompile.steps.layout import Tree

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_INDEX = "model_index.json"


def open_tree(source: str, offline: bool, index: str = _INDEX) -> Tree:
    """The tree of `hf://org/name[@revision]`, which holds a file `index`; offline, what the hub's cache holds of it.

    Raises RecipeError when the hub has no such repository or revision, HostError when it cannot
    be reached or wants a login, or when the cache does not know it.
    """
    from huggingface_hub import constants

    repo, _, revision = source.removeprefix("hf://").partition("@")
    tree = (_cached if offline or constants.HF_HUB_OFFLINE else _online)(repo, revision or "main", index)
    if revision:
        return tree
    note = f"{source} names no revision, so a build tomorrow may differ; write hf://{repo}@{tree.revision}"
    return replace(tree, notes=(note,))


def _online(repo: str, revision: str, index: str) -> Tree:
    from huggingface_hub import HfApi

    def told(name: str) -> ModelInfo:
        with _explained(repo, name):
            return HfApi().model_info(repo, revision=name, files_metadata=True, timeout=30)

    info = told(revision)
    # Downloading one file by the revision's name records name -> commit in the cache, which is what
    # `--offline` resolves names from. The name may have moved on since it was asked about.
    file = _download(repo, revision, index)
    commit = file.parents[index.count("/")].name
    siblings = (info if info.sha == commit else told(commit)).siblings or []
    return Tree(
        f"hf://{repo}",
        f"hf://{repo}@{commit}",
        "hub",
        sizes={s.rfilename: s.size or 0 for s in siblings},
        get=lambda path: _download(repo, commit, path),
        hashes={s.rfilename: s.lfs.sha256 for s in siblings if s.lfs},
        revision=commit,
    )


def _cached(repo: str, revision: str, index: str) -> Tree:
    from huggingface_hub import try_to_load_from_cache

    once = f"run the command once without --offline, or: hf download {repo} --revision {revision}"
    found = try_to_load_from_cache(repo, index, revision=revision)
    if not isinstance(found, str):
        raise HostError(
            f"hf://{repo}@{revision} is not in the hub cache of this machine, and this build is offline", once
        )
    root = Path(found).parents[index.count("/")]
    sizes = {p.relative_to(root).as_posix(): p.stat().st_size for p in sorted(root.rglob("*")) if p.is_file()}
    return Tree(
        f"hf://{repo}", f"hf://{repo}@{root.name}", "hub", sizes, lambda path: root / path,
        partial=once, revision=root.name,
    )  # fmt: skip


def _download(repo: str, revision: str, path: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    # Bars and remarks on retries would tear our live table; `say` tells of progress.
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with _explained(repo, revision, path):
        return Path(hf_hub_download(repo, path, revision=revision))


@contextmanager
def _explained(repo: str, revision: str, path: str = _INDEX) -> Iterator[None]:
    """Turn the hub's errors into ours: which of gated, private, missing or unreachable it is."""
    from huggingface_hub import errors

    where = f"hf://{repo}"
    login = "run `hf auth login` (or set HF_TOKEN) with an account that may read it"
    try:
        yield
    except errors.GatedRepoError as error:
        raise HostError(
            f"{where} is gated: its owner asks you to accept terms first",
            f"accept them on the model's page on the hub, then {login}",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise RecipeError(f"{where} has no revision {revision}", "name a branch, a tag or a commit of it") from error
    except errors.RemoteEntryNotFoundError as error:
        raise RecipeError(
            f"{where}@{revision} has no {path}" + (", so it is not a diffusers model" if path == _INDEX else ""),
            "expected a repository as DiffusionPipeline.push_to_hub makes it"
            if path == _INDEX
            else f"of a whole model, name the folder of its decoder: {where}/vae@{revision}",
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise HostError(
                f"{where} does not exist, or is private (the hub answered 401)", f"check the name, or {login}"
            ) from error
        if isinstance(error, errors.RepositoryNotFoundError):
            raise RecipeError(
                f"{where} does not exist on the hub (it answered {status})", "check the name: hf://org/name@revision"
            ) from error
        raise HostError(f"the hub answered {status} for {where}", f"try again later, or {login}") from error
    # The last two: a download, and a question, that got no answer at all.
    except (errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        raise HostError(
            f"the hub cannot be reached, so {where}@{revision} cannot be read",
            "check the network; if this machine has a copy in its hub cache, add --offline",
        ) from error
