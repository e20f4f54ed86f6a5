"""One target taken out of a bundle of several: the bundle that a build of that target alone would have made.

Files are linked, never built or run again; what was measured and verified of the target goes along.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sdcompile import bundle
from sdcompile.errors import HostError, RecipeError
from sdcompile.files import link
from sdcompile.recipe import Recipe, dump
from sdcompile.runtime.choosing import named
from sdcompile.runtime.profiles import FILE as PROFILES
from sdcompile.steps.package import README, readme


def extract(folder: Path, target: str, output: Path | None = None) -> Path:
    """Write OUTPUT/NAME-TARGET.sdc (beside `folder` unless told otherwise) and return it; an older one is replaced.

    Raises BundleError when a file of the target is damaged, RecipeError when there is no such target, HostError
    when `output` cannot be written.
    """
    whole = bundle.read(folder)
    one = named(folder, whole, target)
    # Places in the bundle -> places in the new one.
    moves = {f"{one.folder_of(name)}/": f"components/{name}/" for name in one.components}
    moves |= {f"{one.reports}/": "reports/", "samplers/": "samplers/", "tokenizer/": "tokenizer/"}
    bundle.check(folder, whole, tuple(moves))
    name = f"{whole.name}-{bundle.folder_of_target(target)}"
    place = (output or folder.resolve().parent) / f"{name}{bundle.SUFFIX}"
    if place.exists() and not (place / "manifest.json").is_file():
        raise RecipeError(f"{place} is there and is no bundle", "choose another folder with --output")
    fresh = place.parent / f".{name}.new"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        files = {}
        for old, entry in whole.files.items():
            for start, begin in moves.items():
                if old.startswith(start):
                    files[begin + old.removeprefix(start)] = entry
                    link(folder / old, fresh / begin / old.removeprefix(start))
        if (folder / PROFILES).is_file():
            shutil.copy2(folder / PROFILES, fresh / PROFILES)  # people edit it, so each bundle has its own
        recipe = Recipe.model_validate(whole.recipe).by_target()[target].model_copy(update={"name": name})
        told = {**dump(recipe), "source": whole.recipe["source"]}
        rows = {part: {"backend": e.backend, "precision": e.precision} for part, e in one.components.items()}
        (fresh / README).write_text(readme(told, {**whole.source, "licence": whole.licence}, {"": rows}), "utf-8")
        files[README] = bundle.entry_of(fresh / README)
        bundle.write(fresh, one.model_copy(update={"name": name, "recipe": told, "files": dict(sorted(files.items()))}))
        shutil.rmtree(place, ignore_errors=True)
        fresh.rename(place)
    except OSError as error:
        raise HostError(f"cannot write {place}: {error.strerror}", "choose another folder with --output") from error
    return place
