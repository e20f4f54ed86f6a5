"""The checker against drawings: it must see what is there, and only that."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from sdcompile.models import tiny
from sdcompile.models.tiny import scenes

COUNT = 40


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(11)
    found = [scenes.sample_scene(rng, "held_out") for _ in range(COUNT)]
    return [(scene, scenes.draw(scene, rng)) for scene in found]


def mean_score(pairs) -> float:
    return float(np.mean([tiny.alignment(image, prompt) for image, prompt in pairs]))


@pytest.mark.parametrize("wording", [0, 1, 2])
def test_drawings_fit_their_captions(drawn, wording):
    scores = [tiny.alignment(image, scenes.caption(scene, wording)) for scene, image in drawn]
    assert min(scores) >= 0.95
    assert np.mean(scores) >= 0.99


def test_drawings_do_not_fit_other_captions(drawn):
    moved = [*drawn[1:], drawn[0]]
    pairs = [(image, scenes.caption(scene)) for (scene, _), (_, image) in zip(drawn, moved, strict=True)]
    assert mean_score(pairs) <= 0.15


def test_swapped_colours_lose_half(drawn):
    pairs = []
    for scene, image in drawn:
        if len(scene.things) == 2:
            one, two = scene.things
            swapped = (dataclasses.replace(one, colour=two.colour), dataclasses.replace(two, colour=one.colour))
            pairs.append((image, scenes.caption(dataclasses.replace(scene, things=swapped))))
    assert 0.35 <= mean_score(pairs) <= 0.65


def first_thing(**changes):
    """A change of the first thing of a scene."""
    return lambda scene: dataclasses.replace(
        scene, things=(dataclasses.replace(scene.things[0], **changes), *scene.things[1:])
    )


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("background", lambda scene: dataclasses.replace(scene, background="gray")),
        ("relation", lambda scene: dataclasses.replace(scene, where="below")),
        ("shape", first_thing(shape="ring")),
        ("size", first_thing(size="large")),
        ("colour", first_thing(colour="orange")),
        ("count", lambda scene: dataclasses.replace(scene, things=scene.things[:1], where="")),
    ],
)
def test_each_part_notices_its_own_fault(part, change):
    scene = scenes.scene_from_caption("a small red circle above a blue square on a yellow background")
    image = scenes.draw(scene, np.random.default_rng(3))
    whole = tiny.alignment_parts(image, scenes.caption(scene))
    faulty = tiny.alignment_parts(image, scenes.caption(change(scene)))
    assert whole.strict
    assert not faulty.strict
    assert getattr(whole, part) == 1.0
    assert getattr(faulty, part) <= 0.5
    assert faulty.score <= whole.score - 0.1


def test_noise_and_blur_lower_the_score_step_by_step(drawn):
    rng = np.random.default_rng(5)
    noisy, blurred = [], []
    for level in (0, 25, 50):
        spoilt = [np.clip(image + rng.normal(0, level, image.shape), 0, 255).astype(np.uint8) for _, image in drawn]
        noisy.append(mean_score((i, scenes.caption(s)) for i, (s, _) in zip(spoilt, drawn, strict=True)))
    for sigma_px in (0, 2, 4):
        spoilt = [ndimage.gaussian_filter(image, (sigma_px, sigma_px, 0)) for _, image in drawn]
        blurred.append(mean_score((i, scenes.caption(s)) for i, (s, _) in zip(spoilt, drawn, strict=True)))
    for scores in (noisy, blurred):
        assert scores[0] - 0.05 > scores[1] > scores[2] + 0.1


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_scores_nothing(seed):
    prompts = tiny.prompts(20, seed)
    noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert mean_score((noise, prompt) for prompt in prompts) <= 0.1
    assert mean_score((np.full((64, 64, 3), 128, np.uint8), prompt) for prompt in prompts) <= 0.1


def test_floats_and_larger_pictures_score_alike(drawn):
    scene, image = drawn[0]
    prompt = scenes.caption(scene)
    score = tiny.alignment(image, prompt)
    assert tiny.alignment(image / 255, prompt) == pytest.approx(score)
    assert tiny.alignment(image.repeat(2, axis=0).repeat(2, axis=1), prompt) == pytest.approx(score)


@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 4), (64, 128, 3), (60, 60, 3), (0, 0, 3)])
def test_other_arrays_are_refused_with_their_size(shape):
    with pytest.raises(ValueError, match=str(shape[0])):
        tiny.alignment(np.zeros(shape, np.uint8), tiny.prompts(1, 0)[0])


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        tiny.alignment(np.full((64, 64, 3), np.nan), tiny.prompts(1, 0)[0])


@pytest.mark.parametrize("text", ["", "a cat", "a red circle", "a mauve circle on a white background"])
def test_unknown_captions_are_refused(text):
    with pytest.raises(ValueError, match="not a caption"):
        tiny.alignment(np.zeros((64, 64, 3), np.uint8), text)


def test_captions_say_the_whole_scene():
    rng = np.random.default_rng(7)
    for _ in range(300):
        scene = scenes.sample_scene(rng, "train")
        for wording in range(3):
            assert scenes.scene_from_caption(scenes.caption(scene, wording)) == scene


def test_things_stay_inside_and_apart():
    rng = np.random.default_rng(8)
    for _ in range(300):
        scene = scenes.sample_scene(rng)
        spots = scenes.place(scene, rng)
        assert all(r + 1 < v < scenes.SIZE_PX - r - 1 for x, y, r in spots for v in (x, y))
        if len(spots) == 2:
            (x, y, r), (x_2, y_2, r_2) = spots
            assert max(abs(x - x_2), abs(y - y_2)) >= r + r_2 + 2.9


def test_prompts_and_pictures_repeat_from_their_seed():
    assert tiny.prompts(30, 4) == tiny.prompts(30, 4)
    assert tiny.prompts(30, 4) != tiny.prompts(30, 5)
    scene = scenes.sample_scene(np.random.default_rng(0))
    first, again = (scenes.draw(scene, np.random.default_rng(9)) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def composition(prompt: str) -> tuple:
    scene = scenes.scene_from_caption(prompt)
    things = frozenset((thing.colour, thing.shape) for thing in scene.things)
    return things if len(things) == 2 else (things, scene.background)


def test_held_out_compositions_are_never_trained_on():
    trained = {composition(prompt) for prompt in tiny.prompts(6000, 1, split="train")}
    held_out = {composition(prompt) for prompt in tiny.prompts(1000, 2, split="held_out")}
    assert len(held_out) > 100
    assert not trained & held_out


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="held_out"):
        tiny.prompts(1, 0, split="test")


def test_importing_the_model_imports_no_heavy_package():
    code = (
        "import sys, sdcompile.models.tiny as tiny; tiny.prompts(2, 0);"
        "print(*{'torch', 'scipy', 'PIL'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""
