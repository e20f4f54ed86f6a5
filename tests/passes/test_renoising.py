"""Inputs of a denoiser made on the fly from the teacher's own answers."""

from __future__ import annotations

import json

import pytest

from sdcompile.errors import StageError
from sdcompile.passes import renoising

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

KINDS = ("epsilon", "v_prediction", "sample")


def schedule(tmp_path, kind: str = "epsilon", **config) -> renoising.Schedule:
    (tmp_path / "scheduler").mkdir(exist_ok=True)
    config = {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "prediction_type": kind, **config}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return renoising.schedule_of(tmp_path)


def noised(known, pictures, timesteps, noise):
    alphas = known.at(timesteps)
    return alphas.sqrt() * pictures + (1 - alphas).sqrt() * noise


def answer(kind, known, pictures, timesteps, noise):
    """What a perfect denoiser says."""
    alphas = known.at(timesteps)
    v = alphas.sqrt() * noise - (1 - alphas).sqrt() * pictures
    return {"epsilon": noise, "v_prediction": v, "sample": pictures}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_answer_gives_the_picture(tmp_path, kind):
    known = schedule(tmp_path, kind)
    random = torch.Generator().manual_seed(0)
    pictures, noise = (torch.randn(5, 4, 8, 8, generator=random) for _ in range(2))
    timesteps = torch.tensor([1.0, 200.0, 500.0, 800.0, 950.0])
    latents = noised(known, pictures, timesteps, noise)
    said = answer(kind, known, pictures, timesteps, noise)
    torch.testing.assert_close(known.picture(latents, timesteps, said), pictures, rtol=1e-3, atol=1e-3)
    wrong = KINDS[(KINDS.index(kind) + 1) % 3]
    other = renoising.Schedule(known.alphas, wrong).picture(latents, timesteps, said)
    assert (other - pictures).abs().max() > 0.1, "the sibling: read as another kind it gives something else"


def test_the_schedule_is_that_of_diffusers(tmp_path):
    from diffusers import DDIMScheduler

    known = schedule(tmp_path, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    theirs = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    noise = torch.randn(2, 4, 8, 8)
    timesteps = torch.tensor([10, 900])
    expected = theirs.add_noise(torch.ones(2, 4, 8, 8), noise, timesteps)
    torch.testing.assert_close(noised(known, torch.ones(2, 4, 8, 8), timesteps.float(), noise), expected)


def test_chosen_rows_are_the_same_pictures_with_new_noise_at_noisier_timesteps(tmp_path):
    known = schedule(tmp_path)
    random = torch.Generator().manual_seed(1)
    count = 64
    pictures, noise = (torch.randn(count, 4, 8, 8, generator=random) for _ in range(2))
    timesteps = torch.full((count,), 300.0)
    told = torch.arange(count).float().view(-1, 1, 1)
    latents = noised(known, pictures, timesteps, noise)
    asked = []

    def teach(call):
        asked.append(call[2].flatten().long())
        return noise[asked[-1]]

    new, then, same = renoising.renoised((latents, timesteps, told), 0.5, known, teach, random)
    (chosen,) = asked
    kept = [row for row in range(count) if row not in chosen.tolist()]
    assert 20 <= len(chosen) <= 44
    assert same is told
    assert torch.equal(new[kept], latents[kept])
    assert torch.equal(then[kept], timesteps[kept])
    assert then[chosen].min() >= 300
    assert then[chosen].max() <= 999
    alphas = known.at(then[chosen])
    found = (new[chosen] - alphas.sqrt() * pictures[chosen]) / (1 - alphas).sqrt()
    assert found.std() == pytest.approx(1, abs=0.05), "pure noise is left where the picture is taken away"
    assert abs(float((found * noise[chosen]).mean())) < 0.05, "and not the noise there was"
    assert torch.equal(latents, noised(known, pictures, timesteps, noise)), "what was recorded is not written to"


def test_rows_become_pictures_with_their_captions_at_any_timestep(tmp_path):
    known, random, count = schedule(tmp_path), torch.Generator().manual_seed(2), 200
    call = (torch.zeros(count, 4, 8, 8), torch.full((count,), 10.0), torch.zeros(count, 1, 1), torch.ones(count, 3))
    latents = 100 * torch.arange(1.0, 4).view(3, 1, 1, 1).expand(3, 4, 8, 8)
    mine = renoising.Pictures(latents, torch.tensor([0, 1, 1]), {2: torch.tensor([5.0, 6.0]).view(2, 1, 1)})
    assert mine.fit(call)
    new, then, told, other = renoising.shown(call, 0.5, known, mine, random)
    rows = (told.flatten() > 0).nonzero()[:, 0]
    assert 70 <= len(rows) <= 130
    assert then[rows].min() < 100
    assert then[rows].max() > 900
    alphas = known.at(then[rows])
    # Of pictures this bright the noise, of variance 1, is told off by the mean of 256 values of it.
    which = (new[rows].mean((1, 2, 3)) / alphas.flatten().sqrt() / 100).round().long() - 1
    noise = (new[rows] - alphas.sqrt() * latents[which]) / (1 - alphas).sqrt()
    early = then[rows] < 600
    assert noise[early].std() == pytest.approx(1, abs=0.05)
    assert set(which[early].tolist()) == {0, 1, 2}
    assert torch.equal(told[rows].flatten()[early], torch.tensor([5.0, 6.0, 6.0])[which[early]])
    assert torch.equal(other, call[3]), "what pictures say nothing of stays the row's own"
    rest = (told.flatten() == 0).nonzero()[:, 0]
    assert torch.equal(new[rest], call[0][rest])
    assert torch.equal(then[rest], call[1][rest])
    assert not call[0].any(), "what was recorded is not written to"


def test_pictures_of_another_size_fit_no_call():
    mine = renoising.Pictures(torch.zeros(1, 4, 8, 8), torch.zeros(1).long(), {2: torch.zeros(1, 77, 3)})
    assert mine.fit((torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 77, 3)))
    assert not mine.fit((torch.zeros(2, 4, 8, 16), torch.zeros(2), torch.zeros(2, 77, 3)))
    assert not mine.fit((torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 154, 3)))


def test_nothing_is_done_where_nothing_is_asked_or_more_is_fed_than_answered(tmp_path):
    known, random = schedule(tmp_path), torch.Generator().manual_seed(0)
    call = (torch.randn(4, 9, 8, 8), torch.full((4,), 10.0), torch.randn(4, 1, 1))
    assert renoising.renoised(call, 0.0, known, lambda _: pytest.fail("nobody is to be asked"), random) is call
    assert renoising.renoised(call, 1.0, known, lambda call: call[0][:, :4], random) is call


def test_a_schedule_that_tells_no_picture_is_refused(tmp_path):
    with pytest.raises(StageError, match="predicts 'flow_prediction'"):
        schedule(tmp_path, "flow_prediction")
