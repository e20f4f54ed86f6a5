"""Finished images that are kept: the same request gives the same bytes, and nothing else gives them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdcompile.errors import HostError, RecipeError
from sdcompile.runtime import SdcompileWarning
from sdcompile.runtime.diskcache import DiskCache
from sdcompile.runtime.imagecache import ImageCache
from sdcompile.runtime.options import Options
from sdcompile.runtime.output import Output
from sdcompile.runtime.pipeline import Pipeline
from sdcompile.runtime.request import Request, resolve
from tests.runtime.test_pipeline import Engines, model_in


class Kept:
    """Pipelines, each as of a process of its own, that share one folder."""

    def __init__(self, folder: Path, limit: int = 1 << 20, **model: Any) -> None:
        self.model = replace(model_in(folder), **model)
        self.folder, self.limit = folder / "kept", limit

    def __call__(self, prompt: Any = "red", **options: Any) -> tuple[Output, bool]:
        """What a call made, and whether the denoiser ran for it."""
        engines = Engines()
        pipe = Pipeline(self.model, engines)
        pipe.keep_images(self.folder, self.limit)
        made = pipe(prompt, **options)
        return made, "unet" in engines.rows


def pixels(made: Output) -> bytes:
    return b"".join(np.asarray(image).tobytes() for image in made.images)


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


@pytest.mark.parametrize("output_type", ["pil", "np", "latent"])
def test_the_same_request_gives_the_same_bytes_without_an_engine(kept: Kept, output_type: str) -> None:
    first, ran = kept(["red", "blue"], seed=3, output_type=output_type)
    again, ran_again = kept(["red", "blue"], seed=3, output_type=output_type)
    assert (ran, ran_again) == (True, False)
    assert pixels(first) == pixels(again)
    assert type(first.images[0]) is type(again.images[0])
    assert first.metadata(1) == again.metadata(1)
    assert (first.timings["images_read"], again.timings["images_read"]) == (0, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4}, {"guidance_scale": 4.0}, {"num_inference_steps": 2}, {"sampler": "euler_ancestral"},
        {"negative_prompt": "blue"}, {"width": 32}, {"output_type": "np"}, {"early_stop": 1e-3},
        {"guidance_interval": (0, 0.5)}, {"latents": np.zeros((1, 4, 4, 6), np.float32)},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_request_is_made(kept: Kept, change: dict[str, Any]) -> None:
    kept(seed=3)
    assert kept(**{"seed": 3, **change})[1]


def test_noise_of_ones_own_is_told_apart_by_its_values(kept: Kept) -> None:
    noise = np.random.default_rng(0).standard_normal((1, 4, 4, 6)).astype(np.float32)
    assert [kept(seed=3, latents=noise)[1], kept(seed=3, latents=noise.copy())[1]] == [True, False]
    assert kept(seed=3, latents=noise + np.float32(1e-6))[1]


def test_every_option_of_a_request_is_in_its_key_but_names(kept: Kept) -> None:
    """Also one that is added later: a field that the key forgot would give a wrong picture."""
    request = resolve(kept.model, "red", Options(seed=1))
    cache = ImageCache(DiskCache(kept.folder, 1), "d1")
    for field in fields(Request):
        changed = cache.key(replace(request, **{field.name: "something else"}))
        assert (changed == cache.key(request)) == (field.name in ("profile", "seeded")), field.name


def test_a_request_without_a_seed_is_another_picture_every_time(kept: Kept) -> None:
    assert [kept()[1], kept()[1]] == [True, True]
    assert not list(kept.folder.glob("*.npz"))


def test_what_a_callback_may_change_is_neither_kept_nor_taken(kept: Kept) -> None:
    plain, _ = kept(seed=3)
    halved, ran = kept(seed=3, callback_on_step_end=lambda *told: {"latents": told[-1]["latents"] * 0.5})
    assert ran
    assert pixels(halved) != pixels(plain)
    assert pixels(kept(seed=3)[0]) == pixels(plain)


def test_looking_on_changes_nothing(kept: Kept) -> None:
    steps: list[int] = []
    assert kept(seed=3, watch=steps.append)[1]
    assert steps == [0, 1, 2, 3]
    assert not kept(seed=3, watch=steps.append)[1]


def test_another_bundle_has_images_of_its_own(kept: Kept, tmp_path: Path) -> None:
    kept(seed=3)
    assert Kept(tmp_path, digest="d2")(seed=3)[1]
    assert Kept(tmp_path, target="gpu")(seed=3)[1], "engines of another target draw alike, and not the same"
    unbuilt = Kept(tmp_path, digest="")
    assert [unbuilt(seed=3)[1], unbuilt(seed=3)[1]] == [True, True], "a model without a digest cannot be told apart"


def test_a_damaged_entry_is_made_anew(kept: Kept) -> None:
    first, _ = kept(seed=3)
    (entry,) = kept.folder.glob("*.npz")
    whole = entry.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # a byte of the pixels: only the checksum tells
    for damage in (b"", b"junk", whole[:-9], bytes(flipped)):
        entry.write_bytes(damage)
        again, ran = kept(seed=3)
        assert ran
        assert pixels(again) == pixels(first)
        assert not kept(seed=3)[1]


def test_an_entry_of_another_kind_is_made_anew(kept: Kept) -> None:
    kept(seed=3)
    (entry,) = kept.folder.glob("*.npz")
    np.savez(entry, images=np.zeros((1, 32, 48, 3), np.float64))
    assert kept(seed=3)[1]


def test_the_folder_stays_below_its_limit(tmp_path: Path) -> None:
    kept = Kept(tmp_path, limit=20_000)  # a picture takes about 5 000
    for seed in range(8):
        kept(seed=seed)
    assert sum(path.stat().st_size for path in kept.folder.iterdir()) <= 20_000
    assert not kept(seed=7)[1]
    assert kept(seed=0)[1]


def test_a_folder_that_cannot_be_written_or_holds_nothing_is_refused(kept: Kept) -> None:
    pipe = Pipeline(kept.model, Engines())
    kept.folder.write_text("a file")
    with pytest.raises(HostError, match="cannot be written"):
        pipe.keep_images(kept.folder, 1 << 20)
    with pytest.raises(RecipeError, match="holds nothing"):
        pipe.keep_images(kept.folder / "x", 0)


def test_a_full_disk_costs_no_picture(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(SdcompileWarning, match="No space left"):
        made, ran = kept(seed=3)
    assert ran
    assert len(made.images) == 1
    assert not list(kept.folder.iterdir())


def test_warming_up_runs_the_engines_whatever_is_kept(kept: Kept) -> None:
    for _ in range(2):
        engines = Engines()
        pipe = Pipeline(kept.model, engines)
        pipe.keep_images(kept.folder, 1 << 20)
        pipe.warm_up()
        assert {"text_encoder", "unet", "vae_decoder"} <= set(engines.rows)
