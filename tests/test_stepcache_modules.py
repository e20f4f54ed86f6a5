"""The shallow UNet, on the deep features of the same call, is the UNet itself: exactly, wherever it is cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from sdcompile.families import FAMILIES
from sdcompile.spec import Range

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.tiny

FAMILY = FAMILIES["sd"]
SMALL: dict[str, Any] = {"cross_attention_dim": 16, "attention_head_dim": 8, "norm_num_groups": 8, "sample_size": 16}
UNETS: dict[str, dict[str, Any]] = {
    "SD 1.x": {"block_out_channels": (16, 32, 32, 32)},
    "SD 2.x": {
        "block_out_channels": (16, 32, 32, 32), "attention_head_dim": (2, 4, 4, 4), "use_linear_projection": True,
    },
    "LCM": {
        "block_out_channels": (16, 32), "time_cond_proj_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "layers of its own in each block, no mid block": {
        "block_out_channels": (16, 24, 32), "layers_per_block": [1, 2, 1], "mid_block_type": None,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}  # fmt: skip
DEPTHS = ((1, 2, 3, 5, 6, 11), (1, 4), (1, 3, 5), (1, 2, 3, 4, 5, 6))
CASES = [(name, depth) for name, depths in zip(UNETS, DEPTHS, strict=True) for depth in depths]


@pytest.fixture(scope="module")
def unets() -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return {name: UNet2DConditionModel(**{**SMALL, **own}).eval() for name, own in UNETS.items()}


def call_of(unet: Any) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(1)
    width = unet.config.time_cond_proj_dim
    rest = (torch.randn(2, width, generator=random),) if width else ()
    sample, states = torch.randn(2, 4, 16, 16, generator=random), torch.randn(2, 7, 16, generator=random)
    return sample, torch.tensor([5.0, 700.0]), states, *rest


def halves(unet: Any, depth: int) -> tuple[Any, Any]:
    from sdcompile.families.sd_stepcache_torch import Shallow, WithDeep

    return WithDeep(unet, depth), Shallow(copy.deepcopy(unet), depth).eval()


@pytest.mark.parametrize(("name", "depth"), CASES)
def test_on_the_features_of_the_same_call_nothing_differs(unets, name, depth):
    unet = unets[name]
    sample, timestep, states, *rest = call_of(unet)
    with torch.no_grad():
        (wanted,) = unet(sample, timestep, states, timestep_cond=rest[0] if rest else None, return_dict=False)
        whole, shallow = halves(unet, depth)
        output, deep = whole(sample, timestep, states, *rest)
        assert torch.equal(output, wanted)
        assert torch.equal(shallow(sample, timestep, states, deep, *rest), wanted)
        assert not torch.allclose(shallow(sample, timestep, states, deep * 1.01, *rest), wanted, atol=1e-6)
    configs = {"unet": dict(unet.config)}
    specs = FAMILY.step_cached(configs, {"unet": plain_spec(unet)}, depth)
    sizes = {"R": Range(2, 2, 2), "h": Range(16, 16, 16), "w": Range(16, 16, 16), "T": Range(7, 7, 7)}
    assert tuple(deep.shape) == specs["unet"].outputs[-1].shape(sizes, "opt")
    names = {name for name, _ in shallow.named_parameters()}
    assert names < {f"unet.{name}" for name, _ in unet.named_parameters()}, "weights keep their names"


def plain_spec(unet: Any) -> Any:
    from sdcompile.spec import ComponentSpec, TensorSpec

    latents = TensorSpec("sample", ("R", 4, "h", "w"), "float32")
    states = TensorSpec("encoder_hidden_states", ("R", "T", 16), "float32")
    return ComponentSpec("unet", (latents, TensorSpec("timestep", ("R",), "float32"), states), (latents,))


def test_a_cut_one_layer_off_is_seen(unets):
    """Features from another place of the same width and size do not pass for the right ones."""
    from sdcompile.families.sd_stepcache_torch import Shallow, WithDeep

    unet = unets["SD 1.x"]
    arguments = call_of(unet)
    with torch.no_grad():
        (wanted,) = unet(*arguments, return_dict=False)
        _, deep = WithDeep(unet, 2)(*arguments)
        output = Shallow(copy.deepcopy(unet), 1).eval()(*arguments, deep)
    assert output.shape == wanted.shape
    assert not torch.allclose(output, wanted, atol=1e-3)


def test_one_changed_weight_outside_the_cut_is_seen(unets):
    unet = unets["SD 1.x"]
    arguments = call_of(unet)
    whole, shallow = halves(unet, 1)
    with torch.no_grad():
        output, deep = whole(*arguments)
        shallow.unet.up_blocks[-1].resnets[-1].conv1.weight[0, 0] += 0.5
        assert not torch.allclose(shallow(*arguments, deep), output, atol=1e-4)


def test_a_timestep_later_the_shallow_half_is_near_and_the_features_are_the_older_ones(unets):
    """The trained model: reusing features is an approximation that a wrong side or row would not be."""
    from diffusers import UNet2DConditionModel

    from sdcompile.models import tiny

    unet = UNet2DConditionModel.from_pretrained(tiny.path() / "unet").eval()
    random = torch.Generator().manual_seed(0)
    latents, states = torch.randn(2, 4, 16, 16, generator=random), torch.randn(2, 16, 128, generator=random)
    with torch.no_grad():
        whole, shallow = halves(unet, 2)
        before, now = torch.tensor([500.0, 500.0]), torch.tensor([480.0, 480.0])
        _, deep = whole(latents, before, states)
        wanted, _ = whole(latents, now, states)

        def error(features: Any) -> float:
            return float((shallow(latents, now, states, features) - wanted).square().mean())

        assert 0 < error(deep) < 0.1 * error(deep.flip(0))
