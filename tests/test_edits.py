"""Edits: a replayed list gives the module that was edited, and one that does not fit is refused."""

from __future__ import annotations

import json

import pytest

from sdcompile import edits
from sdcompile.errors import StageError

pytestmark = pytest.mark.tiny

# SD 1.x counts heads where SD 2.x does, under another name for both: attention_head_dim. Linear projections are 2.x.
CONFIG = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 2, "cross_attention_dim": 24,
    "attention_head_dim": (2, 4), "norm_num_groups": 8, "use_linear_projection": True,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"
HEADS = {"op": "heads", "module": ATTENTION, "of": 4, "keep": [0, 2, 3]}
CHANNELS = {
    "op": "channels", "module": "up_blocks.1.resnets.0", "of": 16, "keep": [0, 1, 4, 5, 6, 7, 10, 11], "groups": 4,
}  # fmt: skip
FORWARD = {
    "op": "feed_forward", "module": "mid_block.attentions.0.transformer_blocks.0.ff", "of": 128,
    "keep": list(range(3, 100)),
}  # fmt: skip
PAIR = {"op": "remove_pair", "down": "down_blocks.0", "down_index": 1, "up": "up_blocks.1", "up_index": 1}
MID = {"op": "remove_mid_block"}
LISTS = {
    "heads": [HEADS], "channels": [CHANNELS], "feed_forward": [FORWARD], "pair": [PAIR], "mid": [MID],
    "composed": [{**HEADS, "keep": [1, 2, 3]}, {**HEADS, "of": 3, "keep": [0, 2]}, CHANNELS, FORWARD, PAIR],
}  # fmt: skip


def unet():
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**CONFIG).eval().requires_grad_(False)


@pytest.fixture
def source(tmp_path):
    unet().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def answer(model):
    import torch

    torch.manual_seed(1)
    with torch.inference_mode():
        return model(torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 24), return_dict=False)[0]


def saved(source, out, made):
    """`made` applied to the model in `source`; the model, and why it is no ordinary folder."""
    from sdcompile import checkpoint

    module = checkpoint.load("sd", "unet", source, {})
    edits.replay(module.unet, made)
    out.mkdir()
    return module.unet, checkpoint.save(module.unet, source, out, made)


@pytest.mark.parametrize("made", LISTS.values(), ids=LISTS)
def test_a_replayed_list_gives_the_module_that_was_edited(source, tmp_path, made):
    import torch

    from sdcompile import checkpoint

    edited, _ = saved(source, tmp_path / "out", made)
    loaded = checkpoint.load("sd", "unet", tmp_path / "out", {}).unet
    assert torch.equal(answer(edited), answer(loaded))
    count = sum(p.numel() for p in loaded.parameters())
    assert count < sum(p.numel() for p in unet().parameters())
    assert checkpoint.parameter_bytes(tmp_path / "out") == (count, 4 * count)
    assert not any(p.is_meta for p in loaded.parameters())


def test_another_list_on_the_same_weights_is_seen(source, tmp_path):
    """The sibling of the parity above: the same shapes from other units compute something else."""
    import torch

    edited, _ = saved(source, tmp_path / "a", [HEADS])
    other, _ = saved(source, tmp_path / "b", [{**HEADS, "keep": [0, 1, 3]}])
    assert not torch.allclose(answer(edited), answer(other), atol=1e-4)


def test_removed_heads_are_those_whose_output_no_longer_counts(source, tmp_path):
    """Cutting a head is what zeroing its columns of to_out is."""
    import torch

    whole = unet()
    projection = whole.get_submodule(ATTENTION).to_out[0]
    projection.weight[:, 8:16] = 0.0  # head 1 of four heads of 8
    edited, _ = saved(source, tmp_path / "out", [HEADS])
    assert torch.allclose(answer(whole), answer(edited), atol=1e-5)
    smaller = edited.get_submodule(ATTENTION)
    assert (smaller.heads, smaller.to_q.out_features, smaller.to_out[0].in_features) == (3, 24, 24)


def test_whole_groups_leave_the_statistics_of_the_others_alone(source, tmp_path):
    import torch

    whole = unet()
    gone = sorted(set(range(16)) - set(CHANNELS["keep"]))
    whole.up_blocks[1].resnets[0].conv2.weight[:, gone] = 0.0
    edited, _ = saved(source, tmp_path / "out", [CHANNELS])
    assert torch.allclose(answer(whole), answer(edited), atol=1e-5)


@pytest.mark.parametrize("made", [[PAIR], [MID], [PAIR, MID]], ids=["pair", "mid", "both"])
def test_removed_blocks_make_an_ordinary_diffusers_folder(source, tmp_path, made):
    import torch
    from diffusers import UNet2DConditionModel

    edited, why = saved(source, tmp_path / "out", made)
    assert why == ""
    assert not (tmp_path / "out" / edits.FILE).exists()
    assert torch.equal(answer(edited), answer(UNet2DConditionModel.from_pretrained(tmp_path / "out").eval()))


def test_what_no_config_can_say_is_said(source, tmp_path):
    for name in ("heads", "channels", "feed_forward"):
        _, why = saved(source, tmp_path / name, LISTS[name])
        assert "width" in why or "narrower" in why
        assert edits.read(tmp_path / name) == LISTS[name]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({**HEADS, "of": 8}, "was made on 8 units; here are 4"),
        ({**HEADS, "keep": [0, 4]}, "no rising choice of 0 to 3"),
        ({**HEADS, "keep": []}, "no rising choice"),
        ({**HEADS, "keep": [2, 2]}, "no rising choice"),
        ({**HEADS, "module": "mid_block.attentions.7"}, "does not fit this model"),
        ({**HEADS, "module": "mid_block.resnets.0"}, "does not fit this model"),
        ({**CHANNELS, "groups": 3}, "leaves 8 channels, which 3 groups cannot share"),
        ({**PAIR, "up_index": 0}, "a resnet of 32 channels would get"),
        ({**PAIR, "up_index": 9}, "names resnet 9 of 3"),
        ({**PAIR, "up": "up_blocks.0"}, "would get"),
    ],
)  # fmt: skip
def test_an_edit_that_does_not_fit_is_refused(edit, words):
    with pytest.raises(StageError) as caught:
        edits.replay(unet(), [edit])
    assert words in caught.value.message


def test_a_second_removal_of_the_mid_block_is_refused():
    with pytest.raises(StageError, match="has no mid block"):
        edits.replay(unet(), [MID, MID])


def test_weights_that_do_not_fit_their_list_are_refused(source, tmp_path):
    from sdcompile import checkpoint

    saved(source, tmp_path / "out", [HEADS])
    edits.write(tmp_path / "out", [{**HEADS, "keep": [0, 2]}])
    with pytest.raises(StageError, match=r"(?s)cannot be loaded: .*size mismatch"):
        checkpoint.load("sd", "unet", tmp_path / "out", {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({"version": 2, "edits": []}), "version 2"),
        (json.dumps({"version": 1, "edits": [{"op": "fold"}]}), "the op 'fold'"),
    ],
)
def test_a_file_that_is_no_list_of_edits_is_refused(tmp_path, text, words):
    (tmp_path / edits.FILE).write_text(text)
    with pytest.raises(StageError, match=words):
        edits.read(tmp_path)


@pytest.mark.parametrize("made", [[PAIR], [MID], [{**PAIR, "down_index": 0, "up_index": 2}, MID, HEADS]], ids=str)
def test_names_of_what_is_left_are_known_without_a_model(made):
    model = unet()
    names = {name: type(module).__name__ for name, module in model.named_modules() if list(module.parameters(False))}
    edits.replay(model, [edit for edit in made if edit is not HEADS])
    left = {name: type(module).__name__ for name, module in model.named_modules() if list(module.parameters(False))}
    assert len(left) < len(names)
    assert edits.renamed(names, made) == left
