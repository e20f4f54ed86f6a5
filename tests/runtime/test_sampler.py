"""The sampling loop and the table files, on tables written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdcompile.errors import BundleError, RecipeError, StageError
from sdcompile.runtime.sampler import sample
from sdcompile.runtime.tables import NOISE, OUTPUT, STATE, Call, Table, Term, load, save, spans

SHAPE = (1, 2, 2, 2)
TABLE = Table(
    "hand",
    2,
    3.0,
    (
        Call(9.5, 0.5, 1, (Term(STATE, 0, 2.0), Term(OUTPUT, 0, -1.0), Term(NOISE, 0, 0.25)), (1.0, -2.0)),
        Call(4.0, 1.0, 1, (Term(STATE, 1, 1.0), Term(OUTPUT, 0, 1.0), Term(OUTPUT, 1, 10.0), Term(NOISE, 1, 1.0))),
    ),
)


def test_every_term_is_applied_at_its_lag() -> None:
    seen: list[tuple[float, float]] = []
    draws = iter([4.0, 400.0])

    def denoise(latents: np.ndarray, index: int, images: np.ndarray) -> np.ndarray:
        seen.append((float(latents.flat[0]), TABLE.calls[index].timestep))
        return np.full(SHAPE, 100.0 * len(seen), np.float32)

    final = sample(TABLE, denoise, np.ones(SHAPE, np.float32), lambda: np.full(SHAPE, next(draws), np.float32))
    # s0 = 3; s1 = 2*3 - 100 + 0.25*4 = -93; s2 = s0 + 200 + 10*100 + first draw
    assert seen == [(1.5, 9.5), (-93.0, 4.0)]
    assert final.dtype == np.float32
    assert np.array_equal(final, np.full(SHAPE, 3.0 + 200.0 + 1000.0 + 4.0))


def test_a_callback_sees_each_step_and_its_latents_are_used_from_there_on() -> None:
    told: list[tuple[int, float]] = []

    def on_step(index: int, timestep: float, latents: np.ndarray) -> np.ndarray | None:
        told.append((index, timestep))
        return np.full(SHAPE, 7.0, np.float32) if index == 1 else None

    zeros = np.zeros(SHAPE, np.float32)
    final = sample(TABLE, lambda x, index, images: zeros, zeros, lambda: zeros, on_step)
    assert told == [(0, 9.5), (1, 4.0)]
    assert np.array_equal(final, np.full(SHAPE, 7.0))


def test_a_value_that_is_not_finite_stops_the_loop_and_names_the_step() -> None:
    zeros = np.zeros(SHAPE, np.float32)
    for bad in (np.nan, np.inf):
        with pytest.raises(StageError, match="step 2 of 2"):
            sample(TABLE, lambda x, index, images, bad=bad: zeros if index == 0 else zeros + bad, zeros, lambda: zeros)


def test_a_stochastic_table_without_noise_to_draw_is_refused() -> None:
    zeros = np.zeros(SHAPE, np.float32)
    with pytest.raises(RecipeError, match="draws noise"):
        sample(TABLE, lambda x, index, images: zeros, zeros)


def test_tables_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    single = Table("hand", 1, 1.0, (Call(1.0, 1.0, 0, (Term(STATE, 0, 1 / 3),)),))
    save(tmp_path, "hand", [TABLE, single])
    assert load(tmp_path, "hand", 2) == TABLE
    assert load(tmp_path, "hand", 1) == single
    with pytest.raises(RecipeError, match="for 1-2 steps, not for 3"):
        load(tmp_path, "hand", 3)


def test_a_missing_or_damaged_table_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="missing or damaged"):
        load(tmp_path, "hand", 2)
    path = save(tmp_path, "hand", [TABLE])
    whole = path.read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(BundleError, match="missing or damaged"):
            load(tmp_path, "hand", 2)


def test_numbers_are_told_as_spans() -> None:
    assert spans([5, 1, 2, 3, 9]) == "1-3, 5, 9"
    assert spans([]) == ""
