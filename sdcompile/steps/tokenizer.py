"""A source's tokenizer folder -> tokenizer.json and entry.json, checked against transformers itself.

Any tokenizer that transformers can load as a fast one will do, with any vocabulary: a
tokenizer.json, or vocab.json and merges.txt. The room knows no model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdcompile.bundle import TokenizerEntry
from sdcompile.errors import RecipeError, StageError
from sdcompile.runtime import SdcompileWarning
from sdcompile.runtime.tokens import Tokenizer
from sdcompile.spec import Job

REVISION = 1

HARD_PROMPTS = (
    "",
    " ",
    "a photo of an astronaut riding a horse on mars",
    "A Red CIRCLE above a blue square, IN THE STYLE OF Hokusai!!!",
    "it's the artist's, they've 1,000.50 (masterpiece:1.2) [x|y] <lora:a:1> <|endoftext|> <|startoftext|>",
    "  many   spaces\tand\ttabs\nand\r\nlines  ",
    "一只戴着帽子的猫，水彩画",
    "ein schönes Mädchen, naïve café, ŁÓDŹ, İstanbul, ﬁne ligature",
    "🦊🌈 fox 👩‍👩‍👧‍👦 family 🇫🇷",
    "zero\u200bwidth \u00a0no-break \u0007bell \x00null \ufeffbom \u202eright-to-left",
    "صورة لقط जलरंग ภาพแมว 고양이 ねこ",
    "e\u0301 versus \u00e9, \u212b versus \u00c5",
    "word " * 1000,
    "antidisestablishmentarianism" * 30,
    "猫" * 200,
    "0123456789" * 20,
)
"""Prompts that tell tokenizers apart: case, white space, control characters, scripts, emoji, length."""


def run(inputs: Mapping[str, Path], out: Path, job: Job) -> None:
    """Convert `inputs["source"]`/tokenizer into `out`/tokenizer.json and entry.json.

    Raises RecipeError when the folder is missing or unusable, StageError when the result would
    cut a prompt into other ids than transformers does.
    """
    folder = inputs["source"] / "tokenizer"
    theirs = _load(folder)
    job.say("writing tokenizer.json", None)
    theirs.backend_tokenizer.save(str(out / "tokenizer.json"))
    entry = _entry(theirs, folder)
    (out / "entry.json").write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
    job.say(f"comparing {len(HARD_PROMPTS)} prompts with transformers", None)
    ours = Tokenizer(out / "tokenizer.json", TokenizerEntry(file="tokenizer.json", **entry))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SdcompileWarning)  # the long prompts are meant to be cut
        for prompt in HARD_PROMPTS:
            expected = ids_of_transformers(theirs, prompt, entry["max_length"])
            found = ours.ids([prompt])[0].tolist()
            if found != expected:
                at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
                raise StageError(
                    f"the converted tokenizer differs from transformers' on {prompt[:60]!r}: id {at} is {found[at]} "
                    f"instead of {expected[at]}",
                    "check that tokenizer.json, vocab.json and merges.txt of the source belong together",
                )


def ids_of_transformers(tokenizer: Any, prompt: str, max_length: int) -> list[int]:
    """The ids that StableDiffusionPipeline would feed its text encoder."""
    ids: list[int] = tokenizer(prompt, padding="max_length", max_length=max_length, truncation=True).input_ids
    return ids


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer, CLIPTokenizer

    if not folder.is_dir():
        raise RecipeError(
            f"the source has no tokenizer: {folder} is missing", "copy tokenizer/ from the model's own repository"
        )
    # Diffusers folders name the tokenizer's class, but have no config.json for AutoTokenizer to start from.
    loader = AutoTokenizer if (folder / "tokenizer_config.json").is_file() else CLIPTokenizer
    try:
        tokenizer = loader.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"the source's tokenizer cannot be read: {error}",
            "tokenizer/ needs tokenizer.json, or vocab.json and merges.txt",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise RecipeError(f"the source's tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json form")
    return tokenizer


def _entry(tokenizer: Any, folder: Path) -> dict[str, int]:
    length = int(tokenizer.model_max_length)
    if not 2 < length < 1 << 16:  # transformers writes 10**30 for "unknown"
        raise RecipeError(
            f"{folder} does not say how many tokens a prompt may have (model_max_length)",
            "add model_max_length (77 for CLIP) to tokenizer_config.json",
        )
    ids = {"bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id}
    missing = [name for name, value in ids.items() if value is None]
    if missing:
        raise RecipeError(f"{folder} names no {' and no '.join(missing).replace('_id', '_token')}")
    pad = tokenizer.pad_token_id
    bos, eos = int(ids["bos_id"]), int(ids["eos_id"])
    return {"max_length": length, "pad_id": eos if pad is None else int(pad), "bos_id": bos, "eos_id": eos}
