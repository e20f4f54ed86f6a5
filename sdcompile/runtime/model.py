"""What a pipeline must know of a model, from a bundle or from the folders a build made.

Data only; it knows no engine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdcompile import bundle
from sdcompile.bundle import Defaults, Manifest, SamplerEntry, TokenizerEntry
from sdcompile.families import FAMILIES
from sdcompile.runtime import profiles
from sdcompile.runtime.offer import Offer
from sdcompile.runtime.profiles import Profiles
from sdcompile.spec import Shapes


@dataclass(frozen=True)
class Model:
    """A text-to-image model without its engines.

    facts      the family's (`Family.facts`)
    shapes     the range of every shape letter its engines take
    tokenizer  the entry; `tokenizer_file` is its tokenizer.json
    samplers   name -> entry; `tables` is the folder that holds <name>.npz
    digest     identity of the bundle; "" for a model that is still being built
    encoder_digest  identity of text encoder and tokenizer; "" as for digest
    profiles   named sets of options
    components those there are engines for; () = not known
    target     which of a bundle's targets its engines are; "" = the bundle has one
    why        why that one was chosen
    """

    name: str
    family: str
    facts: Mapping[str, Any]
    shapes: Shapes
    tokenizer: TokenizerEntry
    tokenizer_file: Path
    samplers: Mapping[str, SamplerEntry]
    tables: Path
    defaults: Defaults
    digest: str = ""
    components: tuple[str, ...] = ()
    encoder_digest: str = ""
    profiles: Profiles = field(default_factory=Profiles)
    target: str = ""
    why: str = ""

    @classmethod
    def from_bundle(cls, folder: Path, manifest: Manifest, why: str = "") -> Model:
        return cls(
            name=manifest.name,
            family=manifest.family,
            facts=manifest.facts,
            shapes=manifest.ranges(),
            tokenizer=manifest.tokenizer,
            tokenizer_file=folder / manifest.tokenizer.file,
            samplers=manifest.samplers,
            tables=folder / "samplers",
            defaults=manifest.defaults,
            digest=bundle.digest(folder),
            components=tuple(manifest.components),
            encoder_digest=_encoder_digest(manifest),
            profiles=profiles.read(folder, _offer(manifest)),
            target=manifest.target,
            why=why,
        )

    @classmethod
    def from_parts(
        cls,
        name: str,
        family: str,
        facts: Mapping[str, Any],
        shapes: Shapes,
        tokenizer: Path,
        tables: Path,
        defaults: Defaults | Mapping[str, Any],
    ) -> Model:
        """A model from build products: the `tokenizer` folder (tokenizer.json, entry.json) and the `tables` folder."""
        entry = json.loads((tokenizer / "entry.json").read_text(encoding="utf-8"))
        rows = json.loads((tables / "samplers.json").read_text(encoding="utf-8"))
        return cls(
            name=name,
            family=family,
            facts=facts,
            shapes=shapes,
            tokenizer=TokenizerEntry(file="tokenizer.json", **entry),
            tokenizer_file=tokenizer / "tokenizer.json",
            samplers={key: SamplerEntry(file=f"{key}.npz", **row) for key, row in rows.items()},
            tables=tables,
            defaults=defaults if isinstance(defaults, Defaults) else Defaults(**defaults),
        )


def _offer(manifest: Manifest) -> Offer:
    compiled = {name: entry.num_inference_steps for name, entry in manifest.samplers.items()}
    family = FAMILIES.get(manifest.family)
    widths = family.widths(manifest.components) if family else None
    return Offer(compiled, manifest.defaults.sampler, manifest.defaults.num_inference_steps, widths)


def _encoder_digest(manifest: Manifest) -> str:
    """sha256 of the names and hashes of the files that make embeddings of prompts."""
    encoder = f"{manifest.folder_of('text_encoder')}/"
    files = sorted(
        (path.replace(encoder, "components/text_encoder/"), entry.sha256)
        for path, entry in manifest.files.items()
        if path.startswith((encoder, "tokenizer/"))
    )
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
