"""Narrower UNets: which widths a config can have, what goes together, and what the rest computes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdcompile import edits
from sdcompile.errors import StageError
from sdcompile.passes import PASSES, widths
from sdcompile.passes.base import Setting
from tests.passes.small_unet import SHAPES, UNET, opened, recorded, run

SD15 = {
    "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8, "norm_num_groups": 32,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
SD21 = {**SD15, "attention_head_dim": [5, 10, 20, 20]}
TINY = {
    "block_out_channels": [64, 96, 96], "attention_head_dim": 4, "norm_num_groups": 16,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
}  # fmt: skip


# --- which widths there are ---


@pytest.mark.parametrize(
    ("config", "ratio", "found", "heads", "even"),
    [
        (SD15, 0.2, [256, 512, 1024, 1024], 8, True),
        (SD15, 0.25, [256, 480, 960, 960], 8, False),
        (SD15, 0.3, [224, 448, 896, 896], 8, True),
        (SD15, 0.5, [160, 320, 640, 640], 8, True),
        (SD21, 0.2, [256, 512, 1024, 1024], [4, 8, 16, 16], True),
        (SD21, 0.5, [160, 320, 640, 640], [5, 10, 20, 20], True),
        (TINY, 0.25, [48, 80, 80], 4, False),
        (TINY, 0.5, [32, 48, 48], 4, True),
    ],
)
def test_a_width_is_the_nearest_that_groups_and_heads_divide(config, ratio, found, heads, even):
    new = widths.narrowed(config, ratio, 8)
    assert new["block_out_channels"] == found
    assert new["attention_head_dim"] == heads
    assert widths.is_even(config, new) is even
    assert new["time_embedding_dim"] == 4 * config["block_out_channels"][0]
    assert all(width % 32 == 0 or (config is TINY and width % 16 == 0) for width in found)


@pytest.mark.parametrize(
    ("config", "params", "words"),
    [
        (SD15, {"ratio": 0.01}, "0.01 is nearer to nothing than to the next legal width"),
        (TINY, {"round_to": 256}, "64 channels are less than 256, which norm_num_groups and round_to both divide"),
        (TINY, {"ratio": 0.4, "round_to": 64}, "would gain or lose a shortcut"),
        ({**SD15, "class_embed_type": "timestep"}, {}, "a UNet with class_embed_type timestep"),
        ({**SD15, "time_cond_proj_dim": 256}, {}, "a UNet with time_cond_proj_dim 256"),
        ({**SD15, "mid_block_type": "UNetMidBlock2D"}, {}, "a UNet with UNetMidBlock2D"),
        ({**SD15, "norm_num_groups": 48}, {}, "320 channels are no whole groups"),
    ],
)
def test_what_a_config_cannot_say_is_refused_before_anything_is_made(config, params, words):
    record = PASSES["width"]
    setting = Setting(config, None, SHAPES, {})
    (fault,) = record.refuses(record.params.model_validate(params), setting)
    assert fault.startswith(("ratio: ", "round_to: "))
    assert words in fault


def test_a_whole_ratio_is_never_refused():
    record = PASSES["width"]
    for ratio in (0, 0.1, 0.25, 0.5, 0.75):
        assert record.refuses(record.params.model_validate({"ratio": ratio}), Setting(SD15, None, SHAPES, {})) == []


# --- models ---

tiny = pytest.mark.tiny


@pytest.fixture(scope="module")
def narrow(small, samples, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("narrow") / "out"
    run("width", small, folder, samples, ratio=0.5)
    return folder


def feeds():
    import torch

    torch.manual_seed(3)
    return torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 24)


def answer(module: Any) -> Any:
    import torch

    with torch.inference_mode():
        return module(*feeds())


def snr_db(wanted: Any, got: Any) -> float:
    return float(10 * np.log10((wanted.square().sum() / (wanted - got).square().sum().clamp(min=1e-30)).item()))


def mean_snr(effect: dict) -> float:
    return sum(effect["mean_snr_db"].values()) / len(effect["mean_snr_db"])


def made(**config: Any) -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**{**UNET, **config}).eval().requires_grad_(False)


SHAPED: list[tuple[dict[str, Any], float]] = [
    ({}, 0.5),
    ({"use_linear_projection": True, "transformer_layers_per_block": 2}, 0.5),
    ({"block_out_channels": (24, 48), "attention_head_dim": (3, 6)}, 0.34),  # whole heads
    ({"block_out_channels": (32, 48), "layers_per_block": 2}, 0.25),  # shares differ
    ({"block_out_channels": (16, 16), "mid_block_type": None}, 0.5),  # no shortcut on the way down
]


@tiny
@pytest.mark.parametrize(("config", "ratio"), SHAPED)
def test_every_stream_is_closed(config, ratio):
    """Weights of all layers have the shapes that diffusers gives the narrower config, whatever each stream keeps."""
    import torch
    from diffusers import UNet2DConditionModel

    from sdcompile.passes import streams

    with torch.device("meta"):
        model = UNet2DConditionModel(**{**UNET, **config})
    thin = made(**{**config, **_fields(widths.narrowed(model.config, ratio, 8))})
    model = model.to_empty(device="cpu").requires_grad_(False)
    for weight in model.parameters():
        weight.fill_(0.01)
    wiring = streams.wired(model)
    kept = {s: _some(s, thin, wiring) for s in wiring.streams()}
    streams.shaped(model, thin, wiring, kept)
    x, t, told = feeds()
    assert thin(x, t, told).sample.isfinite().all()
    named = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    untouched = named - {*wiring.layers, *wiring.norms}
    assert untouched == {"time_embedding.linear_1", "time_embedding.linear_2"}
    for stream in wiring.streams():
        writers = [name for name, wire in wiring.layers.items() if wire.writes is stream]
        assert {thin.get_submodule(name).weight.shape[0] // wiring.layers[name].copies for name in writers} == {
            len(kept[stream])
        }


def _fields(config: dict) -> dict:
    return {name: config[name] for name in ("block_out_channels", "attention_head_dim", "time_embedding_dim")}


def _some(stream: Any, thin: Any, wiring: Any) -> list[int]:
    keep = thin.get_submodule(stream.name).weight.shape[0] // wiring.layers[stream.name].copies
    return sorted(np.random.default_rng(stream.width).permutation(stream.width)[:keep].tolist())


@tiny
def test_a_coupled_layer_that_keeps_another_choice_does_not_fit():
    """The sibling: two layers of one stream that disagree in number have no common shape."""
    from sdcompile.passes import streams

    model, thin = made(), made(**_fields(widths.narrowed(UNET, 0.5, 8)))
    wiring = streams.wired(model)
    kept = {s: _some(s, thin, wiring) for s in wiring.streams()}
    name = "mid_block.resnets.0.conv2"
    own = streams.Stream(name, 32, 8)
    wiring.layers[name] = streams.Wire(wiring.layers[name].reads, own)
    kept[own] = list(range(17))
    with pytest.raises(StageError, match=r"mid_block.resnets.0.conv2.(weight|bias) would be \(17"):
        streams.shaped(model, thin, wiring, kept)


@tiny
def test_diffusers_loads_what_is_left_and_computes_the_same(small, narrow):
    import torch
    from diffusers import UNet2DConditionModel

    assert not (narrow / edits.FILE).exists()
    model = UNet2DConditionModel.from_pretrained(narrow)
    assert tuple(model.config.block_out_channels) == (8, 16)
    x, t, told = feeds()
    with torch.inference_mode():
        assert torch.equal(model(x, t, told).sample, answer(opened(narrow)))
    effect = json.loads((narrow / "effect.json").read_text())
    assert effect["diffusers"] == "an ordinary diffusers folder"
    assert effect["widths"] == {
        "block_out_channels": [[16, 32], [8, 16]], "attention_head_dim": [4, 4], "whole_groups": True,
    }  # fmt: skip
    assert effect["parameters"][1] == sum(p.numel() for p in model.parameters()) < 0.4 * effect["parameters"][0]
    assert effect["macs"][1] < 0.4 * effect["macs"][0]


@tiny
def test_refitting_brings_the_output_nearer(small, samples, narrow, tmp_path):
    plain = run("width", small, tmp_path / "out", samples, ratio=0.5, compensate=False)
    assert mean_snr(json.loads((narrow / "effect.json").read_text())) > mean_snr(plain) + 1


@tiny
def test_the_same_inputs_give_the_same_bytes(small, samples, narrow, tmp_path):
    run("width", small, tmp_path / "out", samples, ratio=0.5)
    assert {path.name for path in narrow.iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "effect.json",
    }  # fmt: skip
    for path in narrow.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


@tiny
def test_a_ratio_of_zero_is_the_identity(small, samples, tmp_path):
    effect = run("width", small, tmp_path / "out", samples, ratio=0)
    assert effect["parameters"][0] == effect["parameters"][1]
    assert effect["snr_db"] == dict.fromkeys(("early", "mid", "late"), 200.0)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((small / "config.json").read_text())


# --- a model whose every channel is there twice ---


def doubled(thin: Any) -> tuple[Any, Any]:
    """(a model of twice the width that computes what `thin` does, its wiring): each channel has a twin beside it."""
    import torch

    from sdcompile.passes import streams

    wide = made()
    wiring = streams.wired(wide)
    old = dict(thin.named_parameters())
    with torch.no_grad():
        for name, weight in wide.named_parameters():
            layer, _, part = name.rpartition(".")
            told, wire = old[name], wiring.layers.get(layer)
            if layer in wiring.norms or (wire is not None and wire.writes is not None):
                told = told.repeat_interleave(2, 0)
            if wire is not None and wire.reads and part == "weight":
                told = told.repeat_interleave(2, 1) / 2
            if layer == "time_embedding.linear_1" and part == "weight":
                told = torch.zeros_like(weight)
            # Scores are sums over twice the dimensions, over the root of twice their number.
            weight.copy_(told / 2**0.5 if layer.endswith(".to_q") else told)
    return wide, wiring


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> tuple[Any, Path, Path]:
    """(the narrow model, its doubled one as a checkpoint, recorded calls of that)."""
    import torch

    thin = made(block_out_channels=(8, 16), time_embedding_dim=64)
    with torch.no_grad():
        thin.time_embedding.linear_1.weight.zero_()
    wide, _ = doubled(thin)
    folder = tmp_path_factory.mktemp("twins")
    wide.save_pretrained(folder)
    return thin, folder, recorded(tmp_path_factory.mktemp("recorded"), folder)


@tiny
def test_of_twins_one_stays_and_takes_over(twins, tmp_path):
    thin, folder, samples = twins
    x, t, told = feeds()
    wanted = thin(x, t, told).sample
    assert snr_db(wanted, answer(opened(folder))) > 90, "doubling changes nothing"
    effect = run("width", folder, tmp_path / "out", samples, ratio=0.5)
    assert mean_snr(effect) > 60
    assert snr_db(wanted, answer(opened(tmp_path / "out"))) > 60


@tiny
def test_a_stream_whose_layers_keep_different_twins_is_lost(twins):
    """The sibling: the same count, another choice in one of the layers that share it."""
    from sdcompile.passes import streams, width

    thin, folder, _ = twins
    x, t, told = feeds()
    wanted = thin(x, t, told).sample
    found = []
    for first in (True, False):
        wide = opened(folder).unet
        empty = made(block_out_channels=(8, 16), time_embedding_dim=64)
        wiring = streams.wired(wide)
        kept = {s: list(range(0, s.width, 2)) for s in wiring.streams()}
        if not first:
            name = "mid_block.resnets.0.conv2"
            own = streams.Stream(name, 32, 8)
            wiring.layers[name] = streams.Wire(wiring.layers[name].reads, own)
            kept[own] = list(range(16))
        streams.shaped(wide, empty, wiring, kept)
        width.refit_time(wide, empty)
        _add_twins(empty, wiring)
        found.append(snr_db(wanted, empty(x, t, told).sample))
    assert found[0] > 90
    assert found[1] < 30


def test_a_narrower_time_embedding_takes_no_weights_that_all_but_cancel(monkeypatch):
    """They would fit as well, and a bf16 engine, which rounds the sinusoids, would miss by what they amplify."""
    import torch
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    from sdcompile.passes import width

    torch.manual_seed(0)
    old, thin = (
        SimpleNamespace(time_proj=Timesteps(count, True, 0), time_embedding=TimestepEmbedding(count, 64))
        for count in (64, 48)
    )
    times, found = torch.arange(1000.0), []
    with torch.no_grad():
        wanted = old.time_embedding.linear_1(old.time_proj(times))
        for ridge in (width._RIDGE, 1e-9):
            monkeypatch.setattr(width, "_RIDGE", ridge)
            width.refit_time(old, thin)
            layer, reads = thin.time_embedding.linear_1, thin.time_proj(times)
            found.append((snr_db(wanted, layer(reads)), snr_db(layer(reads), layer(reads.bfloat16().float()))))
    (fit, rounded), (closest, amplified) = found
    assert fit > closest - 0.5
    assert rounded > 50
    assert amplified < rounded - 15, "the sibling: least squares alone"


def _add_twins(thin: Any, wiring: Any) -> None:
    """What least squares does for a model of twins: a reader counts the one that is left for both."""
    import torch

    with torch.no_grad():
        for name, wire in wiring.layers.items():
            if wire.reads:
                thin.get_submodule(name).weight.mul_(2**0.5 * 2 if name.endswith(".to_q") else 2)


def refitted(folder: Path, thin: Any) -> float:
    """SNR of every second channel of the model in `folder`, refitted beside it, to that model."""
    import torch

    from sdcompile.passes import refitting, streams, width

    module = opened(folder)
    wiring = streams.wired(module.unet)
    for name in wiring.layers:
        if name.endswith(".to_q"):
            wiring.gains[name] = 2**0.5  # one product of two alike, over a lesser root
    kept = {s: list(range(0, s.width, 2)) for s in wiring.streams()}
    streams.shaped(module.unet, thin, wiring, kept)
    width.refit_time(module.unet, thin)
    call = torch.randn(80, 4, 8, 8), torch.arange(80) * 12.0, torch.randn(80, 5, 24)

    def narrow(x: Any, t: Any, told: Any) -> Any:
        return thin(x, t, told).sample

    refitting.refit(module, module.unet, narrow, thin, wiring, kept, call, lambda text, share: None)
    return snr_db(answer(module), narrow(*feeds()))


@tiny
@pytest.mark.parametrize("limit", [6144, 100])
def test_wide_convolutions_are_refitted_through_what_they_read(twins, monkeypatch, limit):
    from sdcompile.passes import sites

    monkeypatch.setattr(sites, "UNFOLDED", limit)
    assert refitted(twins[1], made(block_out_channels=(8, 16), time_embedding_dim=64)) > 60


@tiny
@pytest.mark.parametrize("side", ["narrow", "whole"])
def test_a_fault_on_either_side_ends_both(twins, monkeypatch, side):
    import threading

    from sdcompile.passes import refitting, sites

    def fail(*arguments: Any) -> None:
        raise StageError("the fault")

    before = threading.active_count()
    if side == "narrow":
        monkeypatch.setattr(refitting, "_set", fail)
    else:
        monkeypatch.setattr(sites, "is_unfolded", fail)
    with pytest.raises(StageError, match="the fault"):
        refitted(twins[1], made(block_out_channels=(8, 16), time_embedding_dim=64))
    assert threading.active_count() == before


@tiny
def test_turning_the_dimensions_of_heads_changes_nothing(small, samples):
    import torch

    from sdcompile.passes import thinning

    module, before = opened(small), answer(opened(small))
    torch.manual_seed(1)
    a, b, c = (torch.randn(64, 32).double() for _ in range(3))
    for attention in [m for m in module.unet.modules() if hasattr(m, "to_q")]:
        n = attention.to_q.out_features
        thinning.turn(attention, *((m.T @ m)[:n, :n] for m in (a, b, c)))
        assert attention.to_q.weight.shape[0] == n
    assert snr_db(before, answer(module)) > 80


@tiny
def test_the_time_embedding_of_fewer_sinusoids_gives_nearly_what_it_gave():
    import torch

    from sdcompile.passes import width

    model = made(block_out_channels=(64, 64), norm_num_groups=16)
    with torch.no_grad():  # as trained ones are: of low frequencies
        model.time_embedding.linear_1.weight *= torch.cat([(torch.arange(32) / 8).square()] * 2)
    thin = made(block_out_channels=(48, 48), norm_num_groups=16, time_embedding_dim=256)
    width.refit_time(model, thin)
    times = torch.arange(0, 1000, 7).float()
    wanted = model.time_embedding(model.time_proj(times))
    assert snr_db(wanted, thin.time_embedding(thin.time_proj(times))) > 20


# --- with other passes ---


@tiny
def test_heads_and_blocks_compose_with_it(small, samples, narrow, tmp_path):
    effect = run("heads", narrow, tmp_path / "heads", samples, ratio=0.25, uniform=True)
    assert all(edit["of"] == 4 for edit in effect["edits"])
    assert answer(opened(tmp_path / "heads")).isfinite().all()
    run("blocks", small, tmp_path / "blocks", samples, count=1, mid_block=False)
    run("width", tmp_path / "blocks", tmp_path / "both", samples, ratio=0.5)
    assert edits.read(tmp_path / "both") == edits.read(tmp_path / "blocks") != []
    assert tuple(opened(tmp_path / "both").unet.config.block_out_channels) == (8, 16)
    with pytest.raises(StageError, match="has lost heads already"):
        run("width", tmp_path / "heads", tmp_path / "no", samples, ratio=0.5)


@tiny
def test_step_caching_cuts_the_narrow_model(narrow):
    import torch

    from sdcompile import checkpoint

    cached = {"step_cache_depth": 1}
    output, deep = answer(checkpoint.load("sd", "unet", narrow, cached))
    shallow = checkpoint.load("sd", "unet_cached", narrow, cached)
    with torch.inference_mode():
        assert torch.allclose(shallow(*feeds(), deep), output, atol=1e-6)
    assert deep.shape[1] == 8


@tiny
def test_fields_that_a_config_leaves_to_their_defaults_are_set_too(small, tmp_path):
    from sdcompile.passes import pruning, width

    config = json.loads((small / "config.json").read_text())
    del config["time_embedding_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / weights).symlink_to(small / weights)
    module = opened(tmp_path)
    thin = width._empty(pruning.Subject(module, module.unet, []), widths.narrowed(module.unet.config, 0.5, 8))
    assert thin.time_embedding.linear_2.weight.shape == (64, 64)
