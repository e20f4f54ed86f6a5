"""Passes that simplify attention: what they write, what plans refuse of them, and that graphs compute what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdcompile import edits
from sdcompile.backends import BACKENDS, Probe
from sdcompile.errors import RecipeError, StageError
from sdcompile.passes import PASSES, levels
from sdcompile.plan import Machine, resolve
from sdcompile.recipe import load
from sdcompile.spec import Job, Range
from tests.passes.small_unet import CONFIGS, FAMILY, SHAPES, UNET, opened, run

EVERY = {
    "token_merge": {"ratio": {"0": 0.5}}, "kv_pool": {}, "linear_attention": {"levels": [0, 1]}, "top_k": {"k": 2},
    "sliced_attention": {"slices": {"0": 4, "1": 2}},
}  # fmt: skip


def feeds(rows: int = 2, high: int = 8, wide: int = 8):
    import torch

    torch.manual_seed(3)
    return torch.randn(rows, 4, high, wide), torch.full((rows,), 300.0), torch.randn(rows, 5, 24)


def answer(folder: Path, *given):
    import torch

    with torch.inference_mode():
        return opened(folder)(*(given or feeds())).numpy()


# --- what they write ---


@pytest.mark.tiny
@pytest.mark.parametrize("name", levels.SIMPLIFIERS)
def test_a_pass_keeps_the_weights_and_says_the_rest(small, samples, tmp_path, name):
    effect = run(name, small, tmp_path / "out", samples, **EVERY[name])
    old, new = (next(folder.glob("*.safetensors")) for folder in (small, tmp_path / "out"))
    assert old.read_bytes() == new.read_bytes()
    made = edits.read(tmp_path / "out")
    assert made == effect["edits"]
    assert {edit["op"] for edit in made} == {name}
    (before, after), same = effect["parameters"], np.allclose(answer(small), answer(tmp_path / "out"), atol=1e-5)
    assert before == after
    assert same == PASSES[name].exact
    assert bool(effect["snr_db"]) != PASSES[name].exact
    assert all(5 < level < 100 for level in effect["snr_db"].values())
    assert "config" in effect["diffusers"]
    if name in ("token_merge", "kv_pool", "linear_attention"):
        assert effect["macs"][1] < effect["macs"][0]
    else:
        assert effect["macs"][1] == effect["macs"][0], "these save no multiplication"


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("token_merge", {"ratio": {"0": 0, "1": 0}}),
        ("kv_pool", {"pool": {"0": 1}}),
        ("linear_attention", {"levels": []}),
        ("top_k", {"k": 5}),
        ("top_k", {"k": 77}),
        ("sliced_attention", {"slices": {"0": 1}}),
    ],
)
def test_parameters_that_ask_for_nothing_change_nothing(small, samples, tmp_path, name, params):
    run(name, small, tmp_path / "out", samples, **params)
    assert np.array_equal(answer(small), answer(tmp_path / "out"))


@pytest.mark.tiny
def test_levels_are_resolutions(small):
    places = dict.fromkeys(levels.blocks_of(opened(small).unet))
    assert [(level, module.partition(".attentions")[0]) for level, module in places] == [
        ("0", "down_blocks.0"), ("0", "up_blocks.1"), ("0", "up_blocks.1"), ("1", "mid_block"),
    ]  # fmt: skip
    assert levels.levels_of(UNET) == ["0", "1"]
    assert levels.levels_of({}) == ["0", "1", "2", "3"]
    assert levels.levels_of({**UNET, "mid_block_type": None}) == ["0"]


@pytest.mark.tiny
def test_they_follow_pruning_and_come_before_recovery(small, samples, tmp_path):
    run("heads", small, tmp_path / "a", samples, ratio=0.25, uniform=True)
    run("token_merge", tmp_path / "a", tmp_path / "b", samples, ratio={"1": 0.25}, parts=["ff"])
    lost = run("linear_attention", tmp_path / "b", tmp_path / "c", samples, levels=[0, 1])
    found = run(
        "recover", tmp_path / "c", tmp_path / "d", samples, teacher=small, steps=20, rows=16, learning_rate=5e-5
    )
    ops = [edit["op"] for edit in edits.read(tmp_path / "d")]
    assert ops == ["heads"] * 8 + ["token_merge"] + ["linear_attention"] * 4
    assert sum(found["mean_snr_db"].values()) > sum(lost["mean_snr_db"].values()) + 0.3
    assert list(PASSES).index("channels") < list(PASSES).index("token_merge") < list(PASSES).index("recover")


@pytest.mark.tiny
def test_a_level_that_was_pruned_away_is_missed(small, samples, tmp_path):
    run("blocks", small, tmp_path / "a", samples, remove=["mid_block"])
    with pytest.raises(StageError, match="kv_pool: no attention is left at level 1 of unet"):
        run("kv_pool", tmp_path / "a", tmp_path / "b", samples, pool={"1": 2})


# --- graphs ---


@pytest.mark.tiny
def test_one_graph_of_open_sizes_computes_what_torch_does(small, tmp_path):
    """All five in one model, two backends, a size the graph was not traced at."""
    import onnxruntime
    import openvino

    from sdcompile import checkpoint
    from sdcompile.steps import export_onnx

    down, mid, up = (
        f"{place}.transformer_blocks.0"
        for place in ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.{}")
    )
    made = [
        {"op": "token_merge", "module": down, "ratio": 0.5, "stride": 2, "parts": ["attn1", "ff"]},
        {"op": "top_k", "module": f"{down}.attn2", "k": 2},
        {"op": "kv_pool", "module": f"{up.format(0)}.attn1", "pool": 2},
        {"op": "linear_attention", "module": f"{mid}.attn1"},
        {"op": "sliced_attention", "module": f"{up.format(1)}.attn1", "slices": 4},
    ]
    (tmp_path / "edited").mkdir()
    checkpoint.relabel(small, tmp_path / "edited", made)
    params = {"family": "sd", "opset": 20, "attention": "sdpa", "multiples": FAMILY.facts(CONFIGS)["multiples"]}
    shapes = {**SHAPES, "R": Range(1, 2, 4), "h": Range(4, 8, 16), "w": Range(4, 8, 16)}
    job = Job("unet", params, spec=FAMILY.components(CONFIGS)["unet"], shapes=shapes)
    (tmp_path / "onnx").mkdir()
    export_onnx.run({"checkpoint": tmp_path / "edited"}, tmp_path / "onnx", job)
    path = tmp_path / "onnx" / "model.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for given in (feeds(), feeds(3, 12, 16)):
        told = {t.name: f.numpy() for t, f in zip(job.spec.inputs, given, strict=True)}  # type: ignore[union-attr]
        wanted, other = answer(tmp_path / "edited", *given), answer(small, *given)
        for got in (session.run(None, told)[0], compiled(told)[0]):
            assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
            assert np.abs(got - other).max() > 1e-3 * np.abs(other).max(), "the sibling: it is not the source"


# --- what plans say ---


@pytest.fixture
def plan(tmp_path, source):
    def make(prune: str, shapes: str = "{batch: 1, height: 512, width: 512}"):
        path = tmp_path / "recipe.yaml"
        path.write_text(
            "version: 1\nname: base\nfamily: sd\nsource: ./sd15\nbackend: reference\n"
            f"shapes: {shapes}\ncomponents:\n  unet:\n    prune:\n      {prune}\n"
        )
        probes = {name: Probe(available=True) for name in BACKENDS}
        return resolve(load(path), source, Machine({}, probes, {"machine": "x86_64"}))

    return make


OPEN = "{batch: 1, height: [256, 512, 768], width: 512, tokens: [77, 77, 231]}"


@pytest.mark.parametrize(
    ("prune", "shapes", "expected"),
    [
        ("token_merge: {ratio: {0: 1.0}}", "", "token_merge.ratio.0: 1.0 is out of range: it must be less than 1"),
        ("token_merge: {ratio: {0: -0.1}}", "", "token_merge.ratio.0: -0.1 is out of range: it must be at least 0"),
        ("token_merge: {ratio: {0: 0.8}}", "", "token_merge.ratio.0: 0.8 is more than a stride of 2 can merge (0.75)"),
        (
            "token_merge: {ratio: {4: 0.5}}", "",
            "token_merge.ratio: level '4' has no attention; those that have: 0 (64 x 64), 1 (32 x 32), 2 (16 x 16), "
            "3 (8 x 8)",
        ),
        ("token_merge: {ratio: {high: 0.5}}", "", "token_merge.ratio: level 'high' has no attention"),
        ("token_merge: {ratio: {3: 0.001}}", "", "token_merge.ratio.3: 0.001 of the 64 tokens of the smallest picture"),
        ("token_merge: {ratio: {}}", "", "token_merge.ratio: "),
        ("token_merge: {stride: 3}", "", "token_merge.stride: 3 is not one of"),
        ("token_merge: {parts: []}", "", "token_merge.parts: expected at least one of attn1, attn2, ff"),
        ("token_merge: {parts: [attn3]}", "", "token_merge.parts.0: 'attn3' is not one of attn1, attn2, ff"),
        (
            "token_merge: {ratio: {3: 0.5}}", OPEN,
            "token_merge.stride: 2 does not divide the sides of level 3, which are multiples of 1",
        ),
        ("kv_pool: {pool: {0: 3}}", "", "kv_pool.pool.0: 3 does not divide the sides of level 0, which are multiples"),
        ("kv_pool: {pool: {0: 0}}", "", "kv_pool.pool.0: 0 is out of range: it must be at least 1"),
        ("linear_attention: {levels: [9]}", "", "linear_attention.levels: level '9' has no attention"),
        ("top_k: {k: 0}", "", "top_k.k: 0 is out of range: it must be at least 1"),
        ("top_k: {k: 77}", "", "top_k.k: 77 is not less than the 77 tokens of the shortest prompt"),
        ("top_k: {k: 77}", OPEN, "top_k.k: 77 is not less than the 77 tokens of the shortest prompt"),
        ("sliced_attention: {slices: {3: 3}}", "", "sliced_attention.slices.3: 3 does not divide the tokens of this"),
        (
            "{kv_pool: , token_merge: }", "",
            "kv_pool.pool: attn1 of level 0 has token_merge already; a layer takes one of token_merge, kv_pool",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_when_it_is_planned(plan, prune, shapes, expected):
    with pytest.raises(RecipeError) as caught:
        plan(prune, *([shapes] if shapes else []))
    (line,) = caught.value.message.splitlines()
    assert f"components.unet.prune.{expected}" in line
    assert "recipe.yaml:10: " in line


def test_a_layer_that_the_source_has_simplified_is_not_simplified_again(plan, source):
    block = "up_blocks.3.attentions.1.transformer_blocks.0"
    source.edits["unet"] = [{"op": "kv_pool", "module": f"{block}.attn1", "pool": 2}]
    plan("token_merge: {parts: [attn2]}")
    plan("token_merge: {ratio: {1: 0.5}}")
    with pytest.raises(RecipeError, match=r"token_merge\.ratio: attn1 of level 0 has kv_pool already"):
        plan("token_merge: ")


def test_what_adds_up_is_planned_in_one_order(plan):
    steps = plan("{sliced_attention: {slices: {1: 2}}, recover: , top_k: , kv_pool: {pool: {2: 2}}, token_merge: }")
    road = [s.op for s in steps if s.component == "unet" and s.stage == "prune"]
    assert road == ["token_merge", "kv_pool", "top_k", "sliced_attention", "recover"]


def test_the_same_function_in_slices_keeps_the_floor_of_its_precision(plan):
    sliced = plan("sliced_attention: ")
    assert sliced["unet.verify.engine"].job.params["floor"]["min_snr_db"] == 60
    assert not [step for step in sliced if step.stage == "calibrate"]
    assert plan("kv_pool: ")["unet.verify.engine"].job.params["floor"]["min_snr_db"] == 0


@pytest.mark.parametrize(
    ("nothing", "something"),
    [
        ("{heads: {ratio: 0}, recover: }", "{heads: , recover: }"), ("channels: {ratio: 0}", "channels: "),
        ("width: {ratio: 0}", "width: {ratio: 0.1}"), ("blocks: {count: 0}", "blocks: {count: 0, remove: [mid_block]}"),
        ("token_merge: {ratio: {0: 0}}", "token_merge: "), ("kv_pool: {pool: {0: 1}}", "kv_pool: "),
    ],
)  # fmt: skip
def test_what_changes_nothing_lowers_no_floor(plan, nothing, something):
    floors = [plan(p)["unet.verify.engine"].job.params["floor"]["min_snr_db"] for p in (nothing, something)]
    assert floors == [60, 0]
