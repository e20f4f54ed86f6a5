"""Prompts to ids: against transformers on the tiny model's tokenizer, and what is told of a cut prompt."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

import sdcompile.models.tiny as tiny
from sdcompile.bundle import TokenizerEntry
from sdcompile.errors import BundleError, RecipeError
from sdcompile.runtime import SdcompileWarning
from sdcompile.runtime.tokens import Tokenizer
from sdcompile.spec import Job

SOURCE = Path(tiny.__file__).parent
LENGTH = 8


def word_tokenizer(folder: Path) -> Tokenizer:
    """Words "a" to "e" have ids 2 to 6, between <s> (0) and </s> (1), at most six of them; 7 is unknown, 9 pads."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "d": 5, "e": 6, "?": 7}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    path = folder / "tokenizer.json"
    made.save(str(path))
    return Tokenizer(path, TokenizerEntry(file=path.name, max_length=LENGTH, pad_id=9, bos_id=0, eos_id=1))


def test_a_short_prompt_is_padded(tmp_path: Path) -> None:
    ids = word_tokenizer(tmp_path).ids(["a b", ""])
    assert ids.dtype == np.int64
    assert ids.tolist() == [[0, 2, 3, 1, 9, 9, 9, 9], [0, 1, 9, 9, 9, 9, 9, 9]]


def test_a_prompt_that_just_fits_is_not_cut(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert word_tokenizer(tmp_path).ids(["a b c d e a"]).tolist() == [[0, 2, 3, 4, 5, 6, 2, 1]]


def test_a_long_prompt_is_cut_and_the_words_left_out_are_named(tmp_path: Path) -> None:
    with pytest.warns(SdcompileWarning, match=r"8 tokens.*left out: 'b 猫 🦊'"):
        ids = word_tokenizer(tmp_path).ids(["a b c d e a b 猫 🦊"])
    assert ids.tolist() == [[0, 2, 3, 4, 5, 6, 2, 1]]


def test_a_thousand_words_left_out_are_shown_shortened(tmp_path: Path) -> None:
    with pytest.warns(SdcompileWarning) as caught:
        word_tokenizer(tmp_path).ids(["a " * 1000])
    assert len(str(caught[0].message)) < 400


def test_a_damaged_tokenizer_file_is_refused(tmp_path: Path) -> None:
    entry = TokenizerEntry(file="tokenizer.json", max_length=8, pad_id=0, bos_id=0, eos_id=1)
    for content in (None, "{}", "not json"):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(BundleError, match="missing or damaged"):
            Tokenizer(tmp_path / "tokenizer.json", entry)


@pytest.mark.tiny
def test_the_converted_tokenizer_gives_the_ids_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from sdcompile.steps import tokenizer as step

    step.run({"source": SOURCE}, tmp_path, Job("pipeline"))
    entry = json.loads((tmp_path / "entry.json").read_text(encoding="utf-8"))
    ours = Tokenizer(tmp_path / "tokenizer.json", TokenizerEntry(file="tokenizer.json", **entry))
    theirs = transformers.AutoTokenizer.from_pretrained(SOURCE / "tokenizer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SdcompileWarning)
        for prompt in step.HARD_PROMPTS:
            assert ours.ids([prompt])[0].tolist() == step.ids_of_transformers(theirs, prompt, entry["max_length"]), (
                prompt
            )


@pytest.mark.tiny
def test_a_conversion_that_changes_ids_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from sdcompile.errors import StageError
    from sdcompile.steps import tokenizer as step

    monkeypatch.setattr(step, "ids_of_transformers", lambda theirs, prompt, length: [0] * length)
    with pytest.raises(StageError, match="differs from transformers"):
        step.run({"source": SOURCE}, tmp_path, Job("pipeline"))


@pytest.mark.tiny
def test_a_source_without_a_tokenizer_or_with_a_broken_one_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from sdcompile.steps import tokenizer as step

    with pytest.raises(RecipeError, match="no tokenizer"):
        step.run({"source": tmp_path}, tmp_path, Job("pipeline"))
    shutil.copytree(SOURCE / "tokenizer", tmp_path / "tokenizer")
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("model_max_length")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RecipeError, match="model_max_length"):
        step.run({"source": tmp_path}, tmp_path, Job("pipeline"))
