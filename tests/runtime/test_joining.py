"""Tables begun later, joined, and stopped early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdcompile.errors import BundleError, RecipeError
from sdcompile.runtime.joining import begun_at, joined, signal
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.runtime.sampler import sample
from sdcompile.runtime.tables import OUTPUT, STATE, Call, Start, Table, Term, load, save
from sdcompile.runtime.values import EarlyStop, early_stop, stages
from tests.runtime.test_pipeline import Engines, model_in

SHAPE = (2, 1, 2, 2)
LEVELS = {900.0: 0.2, 600.0: 0.6, 500.0: 0.7, 300.0: 0.9, 200.0: 0.95, 0.0: 1.0}


def ddim(name: str, timesteps: list[float], scale: float = 1.0) -> Table:
    """DDIM by hand for an epsilon model, with latents kept `1 / scale` times as large."""
    calls = []
    for now, then in zip(timesteps, [*timesteps[1:], 0.0], strict=True):
        a, b = LEVELS[now], LEVELS[then]
        p, q = 1 / a, -np.sqrt(1 - a**2) / a
        last = scale if then == 0 else 1.0
        terms = (Term(STATE, 0, last * b * p), Term(OUTPUT, 0, last * (b * q + np.sqrt(1 - b**2)) / scale))
        calls.append(Call(now, scale, 0, terms, (p * scale, q)))
    starts = tuple(Start(i, LEVELS[t] / scale, np.sqrt(1 - LEVELS[t] ** 2) / scale) for i, t in enumerate(timesteps))
    return Table(name, len(timesteps), 1 / scale, tuple(calls), starts)


def run(table: Table, **options: Any) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    return sample(table, lambda x, index, images: np.tanh(x + table.calls[index].timestep / 1000), noise, **options)


def test_samplers_that_share_timesteps_are_joined_exactly() -> None:
    timesteps = [900.0, 600.0, 300.0]
    one, other = ddim("one", timesteps), ddim("other", timesteps, scale=0.25)
    whole, firsts = joined([one, other, one], [1, 1])
    assert (whole.sampler, firsts) == ("one+other+one", (0, 1, 2))
    np.testing.assert_allclose(run(whole), run(one), rtol=1e-5, atol=1e-6)


def test_samplers_of_other_timesteps_are_joined_by_one_more_call() -> None:
    one, other = ddim("one", [900.0, 600.0, 300.0]), ddim("other", [900.0, 500.0, 200.0], scale=0.25)
    whole, firsts = joined([one, other], [1])
    assert [call.timestep for call in whole.calls] == [900, 600, 500, 200]
    assert firsts == (0, 2)
    np.testing.assert_allclose(run(whole), run(ddim("both", [900.0, 600.0, 500.0, 200.0])), rtol=1e-5, atol=1e-6)


def test_noise_levels_are_read_off_the_predicted_clean_latents() -> None:
    for table in (ddim("one", [900.0, 600.0]), ddim("other", [900.0, 600.0], scale=0.25)):
        assert [signal(call) for call in table.calls] == pytest.approx([0.2, 0.6])


def test_a_table_begun_later_starts_from_noised_clean_latents() -> None:
    late = begun_at(ddim("one", [900.0, 600.0, 300.0], scale=0.5), 1)
    clean = np.full(SHAPE, 3.0, np.float32)
    seen: list[np.ndarray] = []
    noise = np.ones(SHAPE, np.float32)
    sample(late, lambda x, index, images: seen.append(x) or np.zeros_like(x), noise, clean=clean)  # type: ignore[func-returns-value]
    np.testing.assert_allclose(seen[0], 0.6 * clean + 0.8 * noise, rtol=1e-6)
    assert len(seen) == 2


def test_tables_without_starts_say_so(tmp_path: Path) -> None:
    bare = Table("bare", 3, 1.0, ddim("one", [900.0, 600.0, 300.0]).calls)
    with pytest.raises(BundleError, match="bare cannot begin at a later step"):
        begun_at(bare, 1)
    with pytest.raises(BundleError, match="bare cannot"):
        joined([ddim("one", [900.0, 600.0, 300.0]), bare], [1])
    with pytest.raises(RecipeError, match="none is left after 3"):
        joined([bare, bare], [3])
    lead = Start(1, 0.5, 0.25, (Call(600.0, 1.0, 0, (Term(STATE, 0, 7.0),), (1.0, -2.0)),))
    table = Table("kept", 3, 1.0, bare.calls, (Start(0, 1.0, 2.0), lead))
    save(
        tmp_path,
        "kept",
        [table, Table("kept", 1, 2.0, bare.calls[:1], (Start(0, 3.0, 4.0),)), ddim("kept", [900.0, 600.0])],
    )
    assert load(tmp_path, "kept", 3) == table
    assert load(tmp_path, "kept", 2) == ddim("kept", [900.0, 600.0])


def still(x: np.ndarray, index: int, images: np.ndarray) -> np.ndarray:
    """Image 1 is settled from the start: its output always predicts the same clean latents."""
    out = np.cos(x * (index + 2))
    a = LEVELS[(900.0, 600.0, 500.0, 300.0, 200.0)[index]]
    out[images == 1] = (x[images == 1] - a * 0.5) / np.sqrt(1 - a**2)
    return out


def test_an_image_that_stops_changing_ends_on_its_clean_latents_and_the_others_go_on() -> None:
    table = ddim("one", [900.0, 600.0, 500.0, 300.0, 200.0])
    noise = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    rows: list[int] = []
    stopped: list[tuple[list[int], int]] = []

    def denoise(x: np.ndarray, index: int, images: np.ndarray) -> np.ndarray:
        rows.append(len(x))
        return still(x, index, images)

    found = sample(
        table, denoise, noise, early_stop=EarlyStop(1e-4, 3), on_stopped=lambda i, n: stopped.append((i.tolist(), n))
    )
    assert rows == [2, 2, 2, 1, 1]
    assert stopped == [([1], 3)]
    np.testing.assert_allclose(found[1], 0.5, atol=1e-5)
    whole = sample(table, still, noise)
    assert np.array_equal(found[0], whole[0])
    assert np.array_equal(sample(table, still, noise, early_stop=EarlyStop(0.0, 1)), whole)


def test_a_request_may_ask_for_stages_and_early_stop(tmp_path: Path) -> None:
    engines = Engines()
    model = model_in(tmp_path)
    calls = ddim("ddim", [900.0, 600.0, 500.0, 200.0])
    save(tmp_path, "ddim", [calls])
    save(tmp_path, "euler_ancestral", [Table("euler_ancestral", 4, 1.0, calls.calls, calls.starts)])
    made = Pipeline(model, engines)("red", seed=1, stages="ddim:2@1,euler_ancestral@3", early_stop=100)
    assert engines.rows["unet"] == [1, 1, 2, 2]
    assert made.timings["steps"] == [4]
    assert made.metadata(0)["stages"] == "ddim:2@1,euler_ancestral@3"
    assert Pipeline(model, Engines())("red", early_stop="100:2").timings["steps"] == [2]


@pytest.mark.parametrize("bad", ["ddim", "ddim,euler", "ddim:0,euler", "ddim:x,euler", "ddim:2,euler:2", [3, 4], 7])
def test_stages_that_make_no_sense_are_refused(bad: Any) -> None:
    with pytest.raises(RecipeError):
        stages(bad)


@pytest.mark.parametrize("bad", ["x", -1, "1e-4:0", {"steps": 3}, None])
def test_thresholds_that_make_no_sense_are_refused(bad: Any) -> None:
    with pytest.raises(RecipeError):
        early_stop(bad)
