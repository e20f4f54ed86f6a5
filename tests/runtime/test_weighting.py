"""Weights on embeddings, chunks of long prompts, and prompt files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdcompile.errors import RecipeError
from sdcompile.runtime import SdcompileWarning
from sdcompile.runtime.embedding import weighted
from sdcompile.runtime.options import Options
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.runtime.promptfiles import Row, read
from sdcompile.runtime.saving import grouped, images_of
from sdcompile.spec import Range
from tests.runtime.test_pipeline import SHAPES, Engines, model_in


@pytest.fixture
def pipe(tmp_path: Path) -> Pipeline:
    model = model_in(tmp_path)
    return Pipeline(replace(model, shapes={**SHAPES, "T": Range(6, 6, 18)}), Engines())


def test_weights_scale_tokens_and_keep_the_mean() -> None:
    states = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32) + 1
    weights = np.array([1, 1.5, 0.5, 1, 1, 1], np.float32)
    found = weighted(states, weights)
    assert found.mean() == pytest.approx(states.mean())
    np.testing.assert_allclose(
        found / (states * weights[:, None]), states.mean() / (states * weights[:, None]).mean(), rtol=1e-6
    )
    assert weighted(states, np.ones(6, np.float32)) is states


def test_plain_prompts_are_the_same_with_and_without_weighting(pipe: Pipeline) -> None:
    plain, off = (pipe.embedder(["red circle", ""], how)["encoder_hidden_states"] for how in ("a1111", "off"))
    assert np.array_equal(plain, off)


def test_notation_is_text_where_weighting_is_off(pipe: Pipeline) -> None:
    assert not np.array_equal(
        pipe.embedder(["(red:1.5) circle"], "a1111")["encoder_hidden_states"],
        pipe.embedder(["(red:1.5) circle"], "off")["encoder_hidden_states"],
    )


def ids(pipe: Pipeline, prompt: str) -> list[list[int]]:
    return [chunk.ids.tolist() for chunk in pipe.embedder.chunks(prompt, "a1111")]


def test_long_prompts_and_breaks_make_chunks(pipe: Pipeline) -> None:
    assert ids(pipe, "red BREAK blue") == [[0, 2, 1, 1, 1, 1], [0, 3, 1, 1, 1, 1]]
    assert ids(pipe, "red red red red blue circle") == [[0, 2, 2, 2, 2, 1], [0, 3, 4, 1, 1, 1]]
    with pytest.warns(SdcompileWarning, match="18 tokens.*left out: 'circle'"):
        assert len(ids(pipe, "red BREAK red BREAK red BREAK circle")) == 3


def test_a_shorter_prompt_is_filled_up_with_the_empty_one(pipe: Pipeline) -> None:
    both = pipe.embedder(["red BREAK blue", "circle"], "a1111")["encoder_hidden_states"]
    assert both.shape == (2, 12, 5)
    assert np.array_equal(both[1, 6:], pipe.embedder([""], "a1111")["encoder_hidden_states"][0])
    assert pipe("red BREAK blue", prompt_weighting="a1111", seed=1).metadata(0)["prompt_weighting"] == "a1111"


def test_weights_too_large_for_a_number_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(RecipeError, match="infinitely"):
        pipe("(red:" + "9" * 400 + ")", prompt_weighting="a1111")


def test_prompt_files_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("red circle\n\n# note\nblue\n", encoding="utf-8")
    assert read(tmp_path / "a.txt") == [Row("red circle"), Row("blue")]
    (tmp_path / "a.csv").write_text(
        'prompt,seed,size,negative\n"red, blue",7,48x32,dull\ncircle,,,\n', encoding="utf-8"
    )
    expected = Row("red, blue", Options(seed=7, width=48, height=32, negative_prompt="dull"))
    assert read(tmp_path / "a.csv") == [expected, Row("circle")]
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "red", "steps": 4, "guidance_interval": [0.2, 0.8]}\n', encoding="utf-8"
    )
    assert read(tmp_path / "a.jsonl") == [Row("red", Options(num_inference_steps=4, guidance_interval=[0.2, 0.8]))]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n# nothing\n", "holds no prompt"),
        ("a.yaml", "x", "one of .txt, .csv, .jsonl"),
        ("a.csv", "prompt,sead\nred,1\n", "a.csv:2: no option is called 'sead'"),
        ("a.csv", "prompt\nred,1\n", "a.csv:2: more values"),
        ("a.csv", "prompt,size\nred,big\n", "a.csv:2: big: not a size"),
        ("a.csv", "prompt,seed\nred,x\n", "a.csv:2: seed='x'"),
        ("a.jsonl", '{"prompt": "a"}\n{', "a.jsonl:2: no JSON"),
        ("a.jsonl", '{"seed": 1}', "a row needs a prompt"),
        ("a.jsonl", '{"prompt": "a", "latents": 1}', "cannot set latents"),
        ("a.jsonl", "[]", "a row is a JSON object"),
    ],
)
def test_prompt_files_with_faults_are_refused_with_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        read(tmp_path / name)


def test_rows_become_images_with_seeds_and_groups_of_like_options() -> None:
    rows = [
        Row("a", Options(num_images_per_prompt=2)),
        Row("b", Options(seed=9)),
        Row("c", Options(height=64)),
        Row("d"),
    ]
    images = images_of(rows, Options(seed=5, negative_prompt="n"))
    assert [(i.prompt, i.seed, i.negative_prompt) for i in images] == [
        ("a", 5, "n"), ("a", 6, "n"), ("b", 9, "n"), ("c", 8, "n"), ("d", 9, "n"),
    ]  # fmt: skip
    assert [[i.prompt for i in group] for group in grouped(images, 2)] == [["a", "a"], ["b"], ["c"], ["d"]]
