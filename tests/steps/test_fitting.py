"""Fitting tables: what least squares and refinement reach on a model written here, and that fits can be refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sdcompile.runtime.sampler import sample
from sdcompile.runtime.tables import Table
from sdcompile.steps import fitting

pytest.importorskip("torch")
pytestmark = pytest.mark.tiny

SHAPE = (6, 2, 4, 4)
CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def model(latents: np.ndarray, timestep: float) -> np.ndarray:
    """An epsilon model of a distribution with two modes, smooth in the timestep."""
    level = np.float32(0.2 + timestep / 1000)
    return latents * level - np.tanh(3 * latents) * (1 - level) * np.float32(0.5)


def table(steps: int) -> Table:
    from sdcompile.steps import sampler

    return sampler.table("DDIMScheduler", CONFIG, steps)


def ran(made: Table, noise: np.ndarray, denoise: Callable[[np.ndarray, float], np.ndarray] = model) -> np.ndarray:
    return sample(made, lambda x, index, images: denoise(x, made.calls[index].timestep), noise)


@pytest.fixture(scope="module")
def noises() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    return first, second


def test_a_fit_lands_nearer_to_the_teacher_than_its_base_on_other_noise(noises: tuple[np.ndarray, ...]) -> None:
    teacher = fitting.record(table(60), model, noises[0])
    base = table(4)
    wanted = ran(table(60), noises[1])
    unfitted = fitting.snr_db(ran(base, noises[1]), wanted)
    reached = []
    for rounds in (0, 3):
        student = fitting.fit(teacher, base, model, noises[0], iterations=rounds)
        made = fitting.table_of(student, "fitted", teacher)
        assert len(made.calls) == 4
        reached.append(fitting.snr_db(ran(made, noises[1]), wanted))
    assert unfitted < reached[0] < reached[1]
    assert reached[1] > fitting.snr_db(ran(table(8), noises[1]), wanted)


def test_a_fit_is_the_same_every_time(noises: tuple[np.ndarray, ...]) -> None:
    teacher = fitting.record(table(20), model, noises[0])
    first, again = (fitting.fit(teacher, table(3), model, noises[0], iterations=1) for _ in range(2))
    assert first == again


def test_the_table_does_what_was_fitted(noises: tuple[np.ndarray, ...]) -> None:
    teacher = fitting.record(table(20), model, noises[0])
    student, final = fitting.along(teacher, (0, 7, 14), model, noises[0])
    made = fitting.table_of(student, "fitted", teacher)
    np.testing.assert_allclose(ran(made, noises[0]), final, atol=1e-5)
    assert all(call.clean is not None for call in made.calls)
    assert not np.allclose(ran(made, noises[0], lambda x, t: model(x, t + 50)), final, atol=1e-3)


def test_clean_facts_of_a_fit_are_those_of_the_schedule(noises: tuple[np.ndarray, ...]) -> None:
    teacher = fitting.record(table(20), model, noises[0])
    student, _ = fitting.along(teacher, (0, 7, 14), model, noises[0])
    calls = fitting.table_of(student, "fitted", teacher).calls
    for call, place in zip(calls, (0, 7, 14), strict=True):
        assert call.clean == pytest.approx(teacher.clean[place])
