"""Distances between pictures: equal ones are at zero, and more damage is more distance."""

from __future__ import annotations

import numpy as np
import pytest

from sdcompile.measure import similarity
from sdcompile.models import tiny
from sdcompile.models.tiny import scenes

pytestmark = pytest.mark.tiny
pytest.importorskip("torchmetrics")


def drawing(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return scenes.draw(scenes.sample_scene(rng, "train"), rng).astype(np.float32) / 255


def test_equal_pictures_are_at_no_distance():
    told = similarity.distances(drawing(), drawing())
    assert told == {"psnr_db": 200.0, "ssim": 1.0, "gmsd": 0.0}


def test_more_noise_is_more_distance_by_every_measure():
    picture = drawing()
    noise = np.random.default_rng(1).standard_normal(picture.shape).astype(np.float32)
    rows = [similarity.distances(picture, np.clip(picture + sigma * noise, 0, 1)) for sigma in (0.01, 0.05, 0.2)]
    for name, rises in (("psnr_db", False), ("ssim", False), ("gmsd", True)):
        values = [row[name] for row in rows]
        assert values == sorted(values, reverse=not rises)
    assert rows[0]["ssim"] > 0.9 > rows[2]["ssim"]


def test_gmsd_sees_a_moved_edge_more_than_a_lighter_picture():
    picture = drawing()
    assert similarity.gmsd(picture, np.roll(picture, 3, axis=1)) > 5 * similarity.gmsd(picture, 0.97 * picture)


def test_sets_of_pictures_are_apart_when_they_differ(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizerFast, CLIPVisionConfig

    from sdcompile.errors import RecipeError
    from sdcompile.measure.features import Features, clip_score, set_distances

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(**small, vocab_size=700, max_position_embeddings=32, eos_token_id=1, bos_token_id=0)
    vision = CLIPVisionConfig(**small, image_size=32, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    model.save_pretrained(tmp_path)
    CLIPTokenizerFast.from_pretrained(tiny.path() / "tokenizer").save_pretrained(tmp_path)
    features = Features(str(tmp_path), offline=True)
    pictures = np.stack([drawing(seed) for seed in range(12)])
    rows = features.of_pictures(pictures)
    assert rows.shape == (12, 16)
    same, apart = set_distances(rows, rows), set_distances(rows, features.of_pictures(1 - pictures))
    assert same["fid"] == pytest.approx(0, abs=1e-3)
    assert apart["fid"] > 10 * abs(same["fid"]) + 1e-3
    assert apart["kid"] > same["kid"]
    words = features.of_prompts(["a red circle", "a blue square"])
    assert 0 <= clip_score(rows[:2], words) <= 100
    assert clip_score(rows[:2], rows[:2]) == pytest.approx(100)
    with pytest.raises(RecipeError, match="at least two pictures"):
        set_distances(rows[:1], rows)
    with pytest.raises(RecipeError, match="no vision model can be loaded"):
        Features(str(tmp_path / "none"), offline=True)
