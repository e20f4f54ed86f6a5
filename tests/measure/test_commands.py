"""bench, eval, experiment and report as commands, on engines that compute nothing and on torch's own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.tiny

RECIPE = """
version: 1
name: {name}
family: sd
source: builtin:tiny
backend: {backend}
precision: fp32
shapes: {{batch: [1, 1, 2]}}
samplers: [ddim, euler]
sampler_steps: [1, 3]
defaults: {{num_inference_steps: 2, guidance_scale: 2.0}}
"""
EXPERIMENT = """
version: 1
name: study
base: stub.yaml
bench: {processes: 1, images: 2}
eval: {prompts: 2, reference: false}
layers:
  - name: ddim
  - {name: euler, set: [defaults.sampler=euler]}
"""


class Desk:
    """A folder with bundles, and the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *words: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "SDCOMPILE_STORE": str(self.folder / "store"), "NO_COLOR": "1", "PYTHONPATH": str(ROOT),
            "SDCOMPILE_PEERS": str(self.folder / "no-peers"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        made = subprocess.run(
            [sys.executable, "-m", "sdcompile", *map(str, words)], cwd=self.folder, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert made.returncode == expect, f"exit {made.returncode}\n{made.stdout}\n{made.stderr}"
        return made

    def event(self, name: str, *words: str | Path, expect: int = 0) -> dict:
        lines = self.run(*words, "--json", expect=expect).stdout.splitlines()
        return next(event for event in map(json.loads, lines) if event["event"] == name)


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    desk = Desk(tmp_path_factory.mktemp("measure"))
    for name in ("stub", "reference"):
        (desk.folder / f"{name}.yaml").write_text(RECIPE.format(name=name, backend=name))
        desk.run("build", f"{name}.yaml", "-o", ".")
    return desk


def test_bench_measures_bundles_and_a_peer_in_turns_and_writes_what_it_shows(desk):
    made = desk.run(
        "bench", "stub.sdc", "reference.sdc", "--vs", "diffusers-fp32", "--processes", "1", "--images", "2",
        "--batch", "2", "-o", "bench.json", "--summary", "summary.md",
    )  # fmt: skip
    told = json.loads((desk.folder / "bench.json").read_text())
    rows = {row["name"]: row for row in told["contenders"]}
    assert set(rows) == {"stub", "reference", "diffusers-fp32"}
    for row in rows.values():
        assert row["figures"]["image_s"]["n"] == 2
        assert row["figures"]["cold_start_s"]["median"] > row["figures"]["load_s"]["median"] > 0
        assert row["peak_bytes"] >= row["anonymous_bytes"] > 10 << 20
        assert row["images_per_s"]["2"]["median"] > 0
    assert rows["reference"]["psnr_db"] > 60, "torch in our runtime and torch in diffusers draw the same"
    assert rows["stub"]["psnr_db"] < 30, "and what computes nothing does not"
    assert rows["reference"]["ratio"]["image_s"]["median"] > 1
    assert "diffusers-fp32" in made.stdout
    assert "stub: below 20 dB" in made.stdout
    assert "| reference |" in (desk.folder / "summary.md").read_text()


def test_a_baseline_of_the_same_passes_and_a_faster_one_fails_with_6(desk):
    quick = ("bench", "stub.sdc", "--processes", "1", "--images", "3")
    desk.run(*quick, "-o", "old.json")
    desk.run(*quick, "--baseline", "old.json", "--max-regression", "900%")
    told = json.loads((desk.folder / "old.json").read_text())
    for figure in ("image_s", "cold_start_s"):
        row = told["contenders"][0]["figures"][figure]
        row["all"] = [value / 100 for value in row["all"]]
        row["median"] /= 100
    (desk.folder / "faster.json").write_text(json.dumps(told))
    error = desk.event("error", *quick, "--baseline", "faster.json", expect=6)
    assert "stub: image_s" in error["message"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("bench", "stub.sdc", "--vs", "nobody"), 2, "no such peer"),
        (("bench", "stub.sdc", "--vs", "optimum-intel"), 3, "an environment of its own"),
        (("bench", "stub.sdc", "stub.sdc"), 2, "named twice"),
        (("bench", "stub.sdc", "--batch", "0"), 2, "not a list of batch sizes"),
        (("bench", "stub.sdc", "--sampler", "unipc"), 2, "has no sampler unipc"),
        (("bench", "nowhere.sdc"), 7, "nowhere.sdc"),
        (("bench", "stub.sdc", "--steps", "40", "--processes", "1"), 2, "compiled for 1-3 steps"),
        (("eval", "stub.sdc", "--no-reference", "--prompts-file", "none.txt"), 2, "none.txt cannot be read"),
        (("eval", "stub.sdc", "--no-reference", "--real", "store", "--features", "x"), 2, "no vision model"),
        (("eval", "stub.sdc", "--no-reference", "--prompts", "2", "--min-alignment", "0.9"), 5, "below the floor 0.9"),
        (("eval", "stub.sdc", "--no-reference", "--prompts", "2", "--min-psnr", "9"), 5, "was not measured"),
        (("eval", "stub.sdc", "--no-reference", "--real", "store"), 2, "--real is for FID and KID"),
        (("experiment", "none.yaml"), 2, "none.yaml"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(desk, words, code, message):
    assert message in desk.event("error", *words, expect=code)["message"]


def test_a_damaged_bundle_is_told_as_one_although_another_process_met_it(desk):
    shutil.copytree(desk.folder / "stub.sdc", desk.folder / "damaged.sdc")
    (desk.folder / "damaged.sdc" / "samplers" / "ddim.npz").write_bytes(b"not an archive")
    error = desk.event("error", "bench", "damaged.sdc", "--processes", "1", "--images", "1", expect=7)
    assert "ddim.npz" in error["message"]
    assert "Traceback" not in error["message"] + error["hint"]


def test_a_report_of_nothing_is_refused_in_words(desk):
    (desk.folder / "empty").mkdir(exist_ok=True)
    assert "empty" in desk.run("report", "empty", expect=7).stderr


def test_a_report_shows_only_figures_of_the_bundle_as_it_is(desk, tmp_path):
    desk.run("eval", "stub.sdc", "reference.sdc", "--no-reference", "--prompts", "1", "-o", tmp_path / "both")
    other = desk.run("bench", "reference.sdc", "--processes", "1", "--images", "1", "-o", tmp_path / "other.json")
    assert other.returncode == 0
    desk.run("report", "stub.sdc", "--no-run", "--eval", tmp_path / "both", "-o", tmp_path / "page.html")
    refused = desk.run("report", "stub.sdc", "--no-run", "--bench", tmp_path / "other.json", expect=2)
    assert "holds no stub as it is now" in refused.stderr
    told = json.loads((tmp_path / "both" / "eval.json").read_text())
    told["bundles"][0]["digest"] = "0" * 64
    (tmp_path / "both" / "eval.json").write_text(json.dumps(told))
    refused = desk.run("report", "stub.sdc", "--no-run", "--eval", tmp_path / "both", expect=2)
    assert "holds no evaluation of stub as it is now" in refused.stderr


def test_two_bundles_of_one_name_keep_their_pictures_apart(desk, tmp_path):
    shutil.copytree(desk.folder / "stub.sdc", tmp_path / "old" / "stub.sdc")
    words = ("eval", "stub.sdc", tmp_path / "old" / "stub.sdc", "--no-reference", "--prompts", "1")
    told = desk.event("eval", *words, "-o", tmp_path / "judged")
    assert [row["folder"] for row in told["bundles"]] == ["stub", "stub-2"]
    assert (tmp_path / "judged" / "stub-2" / "000.png").is_file()


def test_a_peer_is_not_asked_for_what_it_does_not_know(desk, tmp_path):
    from sdcompile.errors import RecipeError
    from sdcompile.measure import contenders
    from sdcompile.models import tiny

    for change, words in (
        (lambda data: data["samplers"]["ddim"].update(fit={"kept": "fitted"}), "sampler ddim, which is fitted"),
        (lambda data: data["defaults"].update(options={"guidance_rescale": 0.7}), "guidance_rescale, a default of"),
    ):
        folder = tmp_path / f"{words[:7].strip()}.sdc"
        shutil.copytree(desk.folder / "stub.sdc", folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (like,) = contenders.of_bundles([folder], contenders.Ask(), 1, "auto")
        with pytest.raises(RecipeError, match=words):
            contenders.of_peer("diffusers-fp32", like, {"source": tiny.path()}, tmp_path)
    (plain,) = contenders.of_bundles([desk.folder / "stub.sdc"], contenders.Ask(), 1, "auto")
    assert contenders.of_peer("diffusers-fp32", plain, {"source": tiny.path()}, tmp_path).kind == "diffusers-fp32"


def test_eval_of_torch_itself_is_exact_and_of_another_model_is_not(desk):
    exact = desk.event("eval", "eval", "reference.sdc", "--prompts", "3", "-o", "judged")["bundles"][0]
    assert exact["figures"]["psnr_db"]["min"] > 100
    assert exact["figures"]["ssim"]["mean"] == 1.0
    stub = desk.event("eval", "eval", "stub.sdc", "--prompts", "3")["bundles"][0]
    assert stub["figures"]["psnr_db"]["mean"] < 30
    assert stub["figures"]["alignment"]["mean"] < exact["figures"]["alignment"]["mean"]
    assert len({row["seed"] for row in exact["pictures"]}) == 3
    with Image.open(desk.folder / "judged" / "reference" / "000.png") as image:
        assert np.asarray(image).std() > 0
    worst = [row["alignment"] for row in exact["worst"]]
    assert worst == sorted(worst)


def test_eval_takes_prompts_from_a_file(desk):
    (desk.folder / "prompts.txt").write_text(
        "# two\na red circle on a white background\n\na blue star on a gray background\n"
    )
    told = desk.event("eval", "eval", "stub.sdc", "--no-reference", "--prompts-file", "prompts.txt")
    assert [row["prompt"] for row in told["bundles"][0]["pictures"]] == [
        "a red circle on a white background", "a blue star on a gray background",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def study(desk) -> Path:
    (desk.folder / "study.yaml").write_text(EXPERIMENT)
    told = desk.event("experiment", "experiment", "study.yaml", "-o", "study", "--summary", "study.md")
    assert [row["name"] for row in told["layers"]] == ["ddim", "euler"]
    assert told["pick"]["layer"] in ("ddim", "euler")
    return desk.folder / "study"


def test_an_experiment_leaves_bundles_pictures_figures_and_a_page(desk, study):
    assert {path.name for path in (study / "bundles").iterdir()} == {"study-00-ddim.sdc", "study-01-euler.sdc"}
    told = json.loads((study / "experiment.json").read_text())
    assert told["layers"][1]["sampler"] == "euler"
    first, second = told["layers"]
    assert first["denoiser"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert second["denoiser"]["ratio"]["median"] > 0
    assert 0 < first["denoiser"]["bytes"] < first["disk_bytes"]
    assert first["change"]["mean"] == 0
    assert second["change"]["mean"] == pytest.approx(
        second["quality"]["alignment"]["mean"] - first["quality"]["alignment"]["mean"], abs=1e-4
    )
    assert (study / "study-01-euler" / "001.png").is_file()
    assert "Experiment study" in (desk.folder / "study.md").read_text()
    page = (study / "report.html").read_text()
    assert page.count("<svg") == 2
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)


def test_faulty_layers_are_told_all_at_once_before_anything_is_built(desk):
    text = (
        EXPERIMENT.replace("name: study", "name: faulty") + "  - {name: bad, set: [backend=openvinno, precision=fp7]}\n"
    )
    (desk.folder / "faulty.yaml").write_text(text)
    error = desk.event("error", "experiment", "faulty.yaml", expect=2)
    assert "layer 'bad'" in error["message"]
    assert "did you mean 'openvino'" in error["message"]
    assert "fp7" in error["message"]
    assert not (desk.folder / "store" / "faulty.experiment").exists()


def test_the_charts_of_a_report_are_drawn_by_a_browser(desk, study, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    desk.run("report", "reference.sdc", "--eval", "judged", "-o", "page.html") if (
        desk.folder / "judged"
    ).is_dir() else (desk.run("report", "reference.sdc", "-o", "page.html"))
    for name, page in (("bundle", desk.folder / "page.html"), ("study", study / "report.html")):
        shot = tmp_path / f"{name}.png"
        subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
             f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,1500", f"--screenshot={shot}",
             page.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        with Image.open(shot) as image:
            pixels = np.asarray(image.convert("RGB"), np.int16)
        # The first series colour of the light or the dark theme, in more than stray pixels.
        drawn = [np.abs(pixels - np.array(colour)).sum(axis=2) < 40 for colour in ((37, 99, 168), (111, 177, 245))]
        assert max(mask.sum() for mask in drawn) > 300, name
