"""Recipes: what is read, what is refused, with which words and at which line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from sdcompile.errors import RecipeError
from sdcompile.recipe import Known, Recipe, Source, dump, load, schema, starter
from sdcompile.recipe.yamltext import scalar


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    threads: int = 1


KNOWN = Known(
    {"sd": {"text_encoder": ("clip_skip",), "unet": (), "vae_decoder": ("source",), "vae_encoder": ()}},
    {"stub": Options, "openvino": None, "reference": None},
    ("ddim", "euler", "dpmpp_2m", "lcm"),
)
GOOD = "version: 1\nname: a\nfamily: sd\nsource: builtin:tiny\nbackend: stub\n"


def read(folder: Path, text: str | bytes, *sets: str) -> Recipe:
    path = folder / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(path, sets, KNOWN)


def faults(folder: Path, text: str | bytes, *sets: str) -> list[str]:
    """The lines of the refusal, without the folder."""
    with pytest.raises(RecipeError) as caught:
        read(folder, text, *sets)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return caught.value.message.replace(f"{folder}/", "").splitlines()


def only(folder: Path, text: str | bytes, *sets: str) -> str:
    lines = faults(folder, text, *sets)
    assert len(lines) == 1, lines
    return lines[0]


def test_the_recipe_of_the_issue_is_read(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        """# sdcompile build recipes/tiny-openvino-bf16.yaml
version: 1
name: tiny-openvino-bf16
family: sd
source: builtin:tiny
backend: openvino
precision: bf16
shapes: {batch: [1, 1, 4], height: [64, 64, 128], width: 64}
samplers: [ddim, dpmpp_2m, {name: karras, scheduler: DPMSolverMultistepScheduler, use_karras_sigmas: true}]
defaults: {sampler: dpmpp_2m, num_inference_steps: 20, guidance_scale: 5}
components: {vae_decoder: {precision: fp32}, vae_encoder: , text_encoder: {backend: stub, clip_skip: 1}}
verify: {unet: {min_snr_db: 30}, on_fail: fallback}
""",
    )
    assert recipe.shapes.batch == (1, 1, 4)
    assert recipe.shape_request == {"batch": (1, 1, 4), "height": (64, 64, 128), "width": (64, 64, 64), "tokens": None}
    assert [s.name for s in recipe.samplers] == ["ddim", "dpmpp_2m", "karras"]
    assert recipe.samplers[2].config == {"use_karras_sigmas": True}
    assert recipe.default_sampler == "dpmpp_2m"
    assert recipe.defaults.guidance_scale == 5.0
    assert recipe.effective("vae_decoder") == ("openvino", "fp32", {}, {})
    assert recipe.effective("text_encoder") == ("stub", "bf16", {"clip_skip": 1}, {})
    assert recipe.wanted(("text_encoder", "unet")) == ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    assert recipe.verify.floors["unet"].min_snr_db == 30
    assert recipe.verify.on_fail == "fallback"


def test_unset_fields_have_the_documented_defaults(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD)
    assert (recipe.precision, recipe.opset, recipe.sampler_steps) == ("fp32", 20, (1, 50))
    assert [s.name for s in recipe.samplers] == ["dpmpp_2m", "euler", "ddim"]
    assert recipe.default_sampler == "dpmpp_2m"
    assert recipe.defaults.model_dump(exclude_none=True) == {
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "negative_prompt": "",
    }
    assert recipe.verify.on_fail == "stop"


def test_null_is_the_same_as_leaving_a_field_out(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD + "opset:\nshapes: {batch: ~}\ndefaults: null\n") == read(tmp_path, GOOD)


def test_build_options_are_inherited_only_by_components_of_the_same_backend(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        GOOD + "build: {threads: 2}\ncomponents: {unet: {backend: openvino}, vae_decoder: {build: {threads: 3}}}\n",
    )
    assert recipe.effective("text_encoder").build == {"threads": 2}
    assert recipe.effective("unet").build == {}
    assert recipe.effective("vae_decoder").build == {"threads": 3}


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        read(tmp_path, GOOD).name = "b"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("precison: fp16", "precison: unknown field 'precison', did you mean 'precision'?"),
        ("precision: fp23", "precision: 'fp23' is not one of fp32, fp16, bf16, int8, did you mean 'fp32'?"),
        ("precision: [fp16]", "precision: ['fp16'] is not one of fp32, fp16, bf16, int8"),
        ("opset: 17", "opset: 17 is out of range: it must be at least 18"),
        ("opset: 24", "opset: 24 is out of range: it must be at most 23"),
        ("opset: true", "opset: expected a whole number, got true"),
        ("opset: '20'", "opset: expected a whole number, got '20'"),
        ("opset: 20.0", "opset: expected a whole number, got 20.0"),
        ("shapes: 3", "shapes: expected a mapping, got 3"),
        ("shapes: {batch: 0}", "shapes.batch: 0 is out of range: every size is from 1 to 65536"),
        ("shapes: {batch: -4}", "shapes.batch: -4 is out of range: every size is from 1 to 65536"),
        ("shapes: {width: 99999999999999999999}", "shapes.width: 99999999999999999999 is out of range"),
        ("shapes: {batch: [1, 4]}", "shapes.batch: expected one number or [min, opt, max], got [1, 4]"),
        ("shapes: {batch: []}", "shapes.batch: expected one number or [min, opt, max], got []"),
        ("shapes: {batch: [4, 1, 1]}", "shapes.batch: [4, 1, 1]: min 4 is above opt 1; the order is [min, opt, max]"),
        ("shapes: {batch: [1, 4, 2]}", "shapes.batch: [1, 4, 2]: opt 4 is above max 2; the order is [min, opt, max]"),
        ("shapes: {batch: [1, 1.5, 2]}", "shapes.batch: expected a whole number, got 1.5"),
        ("shapes: {batch: {min: 1}}", "shapes.batch: expected a whole number, got a mapping"),
        ("shapes: {hieght: 64}", "shapes.hieght: unknown field 'hieght', did you mean 'height'?"),
        ("samplers: []", "samplers: expected at least one entry"),
        ("samplers: ddim", "samplers: expected a list, got 'ddim'"),
        ("samplers: [ddmi]", "samplers.0: unknown sampler 'ddmi', did you mean 'ddim'?"),
        (
            "samplers: [zz]",
            "samplers.0: unknown sampler 'zz' (known: ddim, euler, dpmpp_2m, lcm); or name its diffusers",
        ),
        ("samplers: [3]", "samplers.0: expected a sampler's name, or a mapping with a name, got 3"),
        ("samplers: [{scheduler: X}]", "samplers.0.name: missing field 'name'"),
        ("samplers: [{name: k, schedular: X}]", "samplers.0: unknown field 'schedular', did you mean 'scheduler'?"),
        ("samplers: [{name: k, scheduler: a.b}]", "samplers.0: scheduler 'a.b' is no diffusers class name"),
        ("samplers: [{name: ../k, scheduler: X}]", "samplers.0.name: '../k' is no safe file name"),
        ("samplers: [ddim, ddim]", "samplers.1: sampler 'ddim' is listed twice"),
        ("sampler_steps: [5, 2]", "sampler_steps: [5, 2]: expected 1 <= first <= last <= 1000"),
        ("sampler_steps: [0, 2]", "sampler_steps: [0, 2]: expected 1 <= first <= last <= 1000"),
        ("sampler_steps: [1, 1001]", "sampler_steps: [1, 1001]: expected 1 <= first <= last <= 1000"),
        ("sampler_steps: [1, 8]", "sampler_steps: defaults.num_inference_steps 20 is outside sampler_steps [1, 8]"),
        ("defaults: {num_inference_steps: 60}", "defaults.num_inference_steps: 60 is outside sampler_steps [1, 50]"),
        (
            "defaults: {num_inference_steps: 0}",
            "defaults.num_inference_steps: 0 is out of range: it must be at least 1",
        ),
        ("defaults: {num_inference_steps: -5}", "defaults.num_inference_steps: -5 is out of range"),
        ("defaults: {guidance_scale: .nan}", "defaults.guidance_scale: nan is not a finite number"),
        ("defaults: {guidance_scale: -.inf}", "defaults.guidance_scale: -inf is not a finite number"),
        ("defaults: {guidance_scale: '7'}", "defaults.guidance_scale: expected a number, got '7'"),
        ("defaults: {sampler: eular}", "defaults.sampler: 'eular' is not one of samplers, did you mean 'euler'?"),
        ("defaults: {negative_prompt: 5}", "defaults.negative_prompt: expected text, got 5; put it in quotes"),
        ("components: [unet]", "components: expected a mapping, got a list"),
        ("components: {unett: {}}", "components.unett: unknown component 'unett', did you mean 'unet'?"),
        ("components: {unet: fp16}", "components.unet: expected a mapping, got 'fp16'"),
        ("components: {unet: {backend: opnvino}}", "components.unet.backend: unknown backend 'opnvino', did you mean"),
        (
            "components: {unet: {clip_skip: 1}}",
            "components.unet.clip_skip: unet has no clip_skip; it belongs to text_enc",
        ),
        (
            "components: {unet: {source: builtin:tiny/unet}}",
            "components.unet.source: unet has no source of its own; it belongs to vae_decoder",
        ),
        (
            "components: {vae_decoder: {source: builtin:tiny}}",
            "components.vae_decoder.source: 'builtin:tiny': expected",
        ),
        ("components: {vae_decoder: {source: hf://org}}", "components.vae_decoder.source: 'hf://org': expected hf://"),
        ("components: {vae_decoder: {source: hf://o/n/../x}}", "components.vae_decoder.source: 'hf://o/n/../x': expec"),
        ("components: {vae_decoder: {source: a.safetensors}}", "components.vae_decoder.source: 'a.safetensors' is a f"),
        ("components: {vae_decoder: {source: http://x/y}}", "components.vae_decoder.source: 'http://x/y': expected bu"),
        ("components: {text_encoder: {clip_skip: -1}}", "components.text_encoder.clip_skip: -1 is out of range"),
        ("build: {thread: 2}", "build.thread: unknown field 'thread', did you mean 'threads'?"),
        ("build: {threads: many}", "build.threads: input should be a valid integer"),
        ("components: {unet: {build: {x: 1}}}", "components.unet.build.x: unknown field 'x' (known: threads)"),
        ("verify: {on_fial: stop}", "verify.on_fial: unknown field 'on_fial', did you mean 'on_fail'?"),
        ("verify: {on_fail: ignore}", "verify.on_fail: 'ignore' is not one of stop, fallback"),
        ("verify: {on_nan: continue}", "verify.on_nan: 'continue' is not one of stop, fallback"),
        (
            "components: {unet: {cast: {keep_fp16: [Softmax]}}}",
            "components.unet.cast.keep_fp16: unknown field 'keep_fp16', did you mean 'keep_fp32'?",
        ),
        (
            "components: {unet: {cast: {from_samples: yes}}}",
            "components.unet.cast.from_samples: expected true or false, got 'yes'",
        ),
        ("components: {unet: {cast: {keep_fp32: Softmax}}}", "components.unet.cast.keep_fp32: expected a list"),
        (
            "components: {unet: {cast: {headroom: 4}}}",
            "components.unet.cast: headroom says how samples are judged, and from_samples is not set",
        ),
        ("verify: {unett: {min_snr_db: 3}}", "verify.unett: unknown field 'unett', did you mean 'unet'?"),
        ("verify: {unet: {min_snr: 3}}", "verify.unet.min_snr: unknown field 'min_snr', did you mean 'min_snr_db'?"),
        ("verify: {unet: {min_cosine: 2}}", "verify.unet.min_cosine: 2 is out of range: it must be at most 1"),
        ("verify: {unet: 30}", "verify.unet: expected a mapping, got 30"),
        ("verify: {prompts: []}", "verify.prompts: expected at least one entry"),
        ("verify: {prompts: a cat}", "verify.prompts: expected a list, got 'a cat'"),
        ("verify: {seed: -1}", "verify.seed: -1 is out of range: it must be at least 0"),
        ("source_config: https://x/y", "source_config: 'https://x/y': expected builtin:NAME, hf://org/name@revision"),
    ],
)
def test_a_fault_is_told_at_its_line_in_these_words(tmp_path: Path, line: str, fault: str) -> None:
    assert only(tmp_path, GOOD + line + "\n").startswith(f"r.yaml:6: {fault}")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("version: 1", "version: 2", "r.yaml:1: version: this sdcompile reads recipes of version 1, got 2"),
        ("version: 1", "version: '1'", "r.yaml:1: version: this sdcompile reads recipes of version 1, got '1'"),
        ("version: 1\n", "", "r.yaml:1: version: missing field 'version'"),
        ("name: a", "name: 2024", "r.yaml:2: name: expected text, got 2024; put it in quotes"),
        ("name: a", "name: ../a", "r.yaml:2: name: '../a' is no safe file name"),
        ("name: a", "name: .a", "r.yaml:2: name: '.a' is no safe file name"),
        ("name: a", "name: -a", "r.yaml:2: name: '-a' is no safe file name"),
        ("name: a", "name: ''", "r.yaml:2: name: '' is no safe file name"),
        ("name: a", 'name: "a\\n"', "r.yaml:2: name: 'a"),
        ("family: sd", "family: sdd", "r.yaml:3: family: unknown family 'sdd', did you mean 'sd'?"),
        ("family: sd", "family: flux", "r.yaml:3: family: unknown family 'flux' (known: sd)"),
        ("backend: stub", "backend: stubb", "r.yaml:5: backend: unknown backend 'stubb', did you mean 'stub'?"),
        (
            "builtin:tiny",
            "model.ckpt",
            "r.yaml:4: source: 'model.ckpt' is a pickle, which can run code when it is read",
        ),
        ("builtin:tiny", "m/x.BIN", "r.yaml:4: source: 'm/x.BIN' is a pickle"),
        ("builtin:tiny", "https://huggingface.co/a/b", "r.yaml:4: source: 'https://huggingface.co/a/b': expected"),
        ("builtin:tiny", "hf://a", "r.yaml:4: source: 'hf://a': expected hf://org/name or hf://org/name@revision"),
        ("builtin:tiny", "hf://a/b@", "r.yaml:4: source: 'hf://a/b@': expected hf://org/name"),
        ("builtin:tiny", "'builtin:../x'", "r.yaml:4: source: 'builtin:../x': expected builtin:NAME"),
        ("builtin:tiny", "''", "r.yaml:4: source: the source is empty"),
        ("builtin:tiny", "7", "r.yaml:4: source: expected text, got 7; put it in quotes"),
    ],
)
def test_a_fault_in_a_required_field_is_told_in_these_words(tmp_path: Path, old: str, new: str, fault: str) -> None:
    assert faults(tmp_path, GOOD.replace(old, new))[0].startswith(fault)


def test_a_default_size_outside_the_shapes_is_a_fault(tmp_path: Path) -> None:
    line = only(tmp_path, GOOD + "shapes: {height: 64}\ndefaults: {height: 96}\n")
    assert line == "r.yaml:7: defaults.height: 96 is outside shapes.height [64 to 64]"


def test_all_faults_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        "version: 1\nname: ../x\nfamily: sdd\nsource: m.ckpt\nbackend: opnvino\nprecison: fp16\n"
        "shapes:\n  batch: [4, 1, 1]\n  widht: 3\nsamplers: [ddmi, ddim, ddim]\n"
        "defaults: {num_inference_steps: 60, guidance_scale: .nan}\n"
        "components:\n  unett: {clip_skip: 1}\n  unet:\n    precision: fp23\nname: again\n"
    )
    where = [re.match(r"r\.yaml:(\d+): ([\w.]+):", line).groups() for line in faults(tmp_path, text)]  # type: ignore[union-attr]
    assert where == [
        ("2", "name"),
        ("3", "family"),
        ("4", "source"),
        ("5", "backend"),
        ("6", "precison"),
        ("8", "shapes.batch"),
        ("9", "shapes.widht"),
        ("10", "samplers.0"),
        ("10", "samplers.2"),
        ("11", "defaults.guidance_scale"),
        ("11", "defaults.num_inference_steps"),
        ("13", "components.unett"),
        ("15", "components.unet.precision"),
        ("16", "name"),
    ]


def test_very_many_faults_are_cut(tmp_path: Path) -> None:
    lines = faults(tmp_path, GOOD + "".join(f"x{n}: 1\n" for n in range(200)))
    assert len(lines) == 41
    assert lines[-1] == "... and 160 more"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "r.yaml:1: the recipe is empty"),
        ("# only a comment\n", "r.yaml:1: the recipe is empty"),
        ("---\n", "r.yaml:1: the recipe is empty"),
        ("- 1\n", "r.yaml:1: a recipe is a mapping of fields, got a list"),
        ("just words\n", "r.yaml:1: a recipe is a mapping of fields, got 'just words'"),
        ("a: [1\n", "r.yaml:2:1: not YAML: expected ',' or ']'"),
        ("a:\n\tb: 1\n", "r.yaml:2:1: not YAML: a tab indents this line; YAML takes spaces only"),
        ("a: b: c\n", "r.yaml:1:5: not YAML: ': ' inside a value; put quotes around the value"),
        ("a: 'x\n", "r.yaml:2:1: not YAML: found unexpected end of stream"),
        ("a: @x\n", "r.yaml:1:4: not YAML: found character '@'"),
        ("a: 1\nb: \x01\n", "r.yaml:2:4: character U+0001 is not allowed in YAML"),
        ("? [a]\n: 1\n", "r.yaml:1:3: a key must be a plain name"),
        (GOOD + "---\nversion: 1\n", "r.yaml:6:1: a second document starts here"),
        (GOOD + "precision: &p fp16\n", "r.yaml:6: precision: anchor '&p': anchors are not read here"),
        (GOOD + "precision: *p\n", "r.yaml:6: precision: alias '*p': aliases are not read here"),
        (GOOD + "opset: !!str 20\n", "r.yaml:6: opset: tag '!!str': tags are not read here"),
        (GOOD + "opset: !!python/object:os.system x\n", "r.yaml:6: opset: tag '!!python/object:os.system'"),
        (GOOD + "opset: !x 20\n", "r.yaml:6: opset: tag '!x'"),
        (GOOD + "<<: {opset: 20}\n", "r.yaml:6: <<: unknown field '<<'"),
        (
            GOOD + "shapes: {batch: 1, batch: 2}\n",
            "r.yaml:6: shapes.batch: duplicate key 'batch', first given on line 6",
        ),
        (GOOD + "build: " + "[" * 200 + "]" * 200, "r.yaml:6: build.0.0: nested deeper than 32 levels"),
        (GOOD + "build: " + "{a: " * 5000 + "}" * 5000, "r.yaml:6: build.a.a: nested deeper than 32 levels"),
        (GOOD + "%TAG ! x\n", "r.yaml:7:1: not YAML"),
    ],
)
def test_a_text_that_is_no_recipe_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    assert faults(tmp_path, text)[0].startswith(fault)


def test_a_yaml_bomb_is_refused_without_being_expanded(tmp_path: Path) -> None:
    text = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True):
        text += f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    lines = faults(tmp_path, text)
    assert lines[0] == "r.yaml:1: a: anchor '&a': anchors are not read here, remove it"
    assert lines[-1].startswith("... and ")


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"version: 1\nname: caf\xe9\n", "r.yaml:2: the text is not UTF-8: byte 0xe9 at offset 20"),
        ("version: 1\n".encode("utf-16"), "r.yaml:1: the text is not UTF-8: byte 0xff at offset 0"),
        (b"\xef\xbb\xbfversion: 1\n\xff", "r.yaml:2: the text is not UTF-8: byte 0xff at offset 14"),
        (b"\x80PNG\x00\x01", "r.yaml:1: the text is not UTF-8: byte 0x80 at offset 0"),
    ],
)
def test_text_that_is_not_utf8_is_refused_with_the_byte(tmp_path: Path, data: bytes, fault: str) -> None:
    assert only(tmp_path, data) == fault


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()).name == "a"


def test_a_file_above_the_limit_is_refused(tmp_path: Path) -> None:
    assert only(tmp_path, b"#" * ((1 << 20) + 1)) == "r.yaml is larger than 1 MiB; that is no recipe"


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder; a recipe is a YAML file"):
        load(tmp_path, (), KNOWN)
    with pytest.raises(RecipeError, match="there is no recipe") as caught:
        load(tmp_path / "none.yaml", (), KNOWN)
    assert "sdcompile init" in caught.value.hint
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load("a\0b", (), KNOWN)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load(tmp_path / "file" / "r.yaml", (), KNOWN)


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*: Permission denied"):
        load(path, (), KNOWN)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("yes", "yes"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("012", 12), ("0o14", 12),
        ("0x1f", 31), ("1e-3", 0.001), ("1_000", "1_000"), (".5", 0.5), ("5.", 5.0), ("-.inf", -float("inf")),
        ("null", None), ("~", None), ("", None), ("True", True), ("tRue", "tRue"), ("9" * 5000, "9" * 5000), ("+3", 3),
    ],
)  # fmt: skip
def test_plain_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_set_goes_through_the_same_validation(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        GOOD + "components:\nopset: 21\nsamplers: [euler]\n",
        "components.unet.precision=fp16",
        "shapes.batch=[1, 2, 4]",
        "samplers.0=ddim",
        "samplers.1={name: k, scheduler: X}",
        "samplers.1.use_karras_sigmas=true",
        "opset=",
        "defaults.negative_prompt=blurry, no hands",
        "source=hf://org/name@abc",
    )
    assert recipe.effective("unet").precision == "fp16"
    assert recipe.shapes.batch == (1, 2, 4)
    assert [s.name for s in recipe.samplers] == ["ddim", "k"]
    assert recipe.samplers[1].config == {"use_karras_sigmas": True}
    assert recipe.opset == 20
    assert recipe.defaults.negative_prompt == "blurry, no hands"
    assert recipe.source_of() == Source("hub", "org/name", "abc")


@pytest.mark.parametrize(
    ("assignment", "fault"),
    [
        ("precison=fp16", "precison: unknown field 'precison', did you mean 'precision'?"),
        ("precision=fp23", "precision: 'fp23' is not one of fp32, fp16"),
        ("components.unet.precision=fp23", "components.unet.precision: 'fp23' is not one of fp32, fp16"),
        ("components.unett.precision=fp16", "components.unett: unknown component 'unett', did you mean 'unet'?"),
        ("backend=opnvino", "backend: unknown backend 'opnvino', did you mean 'openvino'?"),
        ("name=", "name: missing field 'name'"),
        ("opset", "expected FIELD=VALUE, as in --set components.unet.precision=fp16"),
        ("=5", "expected FIELD=VALUE"),
        ("a..b=5", "expected FIELD=VALUE"),
        ("name.x=5", "name: is 'a', so it has no field 'x'"),
        ("samplers.x=ddim", "samplers: has entries 0 to 0; 'x' is none of them (1 appends)"),
        ("samplers.2=ddim", "samplers: has entries 0 to 0; '2' is none of them (1 appends)"),
        ("samplers.-1=ddim", "samplers: has entries 0 to 0; '-1' is none of them (1 appends)"),
        ("samplers.0=ddmi", "samplers.0: unknown sampler 'ddmi', did you mean 'ddim'?"),
        ("shapes.batch=[1,2", "shapes.batch: not YAML: expected ',' or ']'"),
        ("shapes.batch=[4,2,1]", "shapes.batch: [4, 2, 1]: min 4 is above opt 2"),
        ("opset=!!int 20", "opset: tag '!!int': tags are not read here"),
        ("opset=*a", "opset: alias '*a': aliases are not read here"),
        ("defaults.sampler=lcm", "defaults.sampler: 'lcm' is not one of samplers"),
    ],
)
def test_a_fault_of_set_is_told_with_the_assignment(tmp_path: Path, assignment: str, fault: str) -> None:
    assert only(tmp_path, GOOD + "samplers: [euler]\n", assignment).startswith(f"--set {assignment}: {fault}")


def test_set_mends_a_fault_of_the_file(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD + "opset: 99\n", "opset=21").opset == 21


def test_faults_of_the_file_and_of_set_come_together(tmp_path: Path) -> None:
    lines = faults(tmp_path, GOOD + "opset: 1\n", "precision=x", "foo=1")
    assert [line.split(":")[0] for line in lines] == ["r.yaml", "--set precision=x", "--set foo=1"]


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("builtin:tiny", ("builtin", "tiny", None)),
        ("hf://org/name", ("hub", "org/name", None)),
        ("hf://org/name@refs/pr/1", ("hub", "org/name", "refs/pr/1")),
    ],
)
def test_sources_are_taken_apart(tmp_path: Path, source: str, parts: tuple[str, str, str | None]) -> None:
    assert read(tmp_path, GOOD, f"source={source}").source_of() == parts


@pytest.mark.parametrize(
    "source", ["builtin:tiny/vae_light", "hf://o/n@main", "hf://o/n/vae/x@1.0", "../taesd", "/a/b"]
)
def test_a_decoder_may_have_a_source_of_its_own(tmp_path: Path, source: str) -> None:
    recipe = read(tmp_path, GOOD, f"components.vae_decoder.source={source}")
    assert recipe.component_sources == {"vae_decoder": source}


def test_a_relative_source_starts_at_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read(tmp_path, GOOD.replace("builtin:tiny", "models/sd"), "source_config=/abs/dir")
    assert recipe.source_of() == ("path", str(tmp_path / "models/sd"), None)
    assert recipe.source_of(recipe.source_config) == ("path", "/abs/dir", None)
    monkeypatch.setenv("HOME", "/home/ann")
    assert recipe.path("~/m") == Path("/home/ann/m")


def test_dump_is_json_and_reads_back_equal(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        GOOD + "verify: {unet: {min_snr_db: 30}}\ncomponents: {vae_encoder: }\nshapes: {batch: [1, 2, 4]}\n",
        "samplers=[ddim, {name: k, scheduler: X, use_karras_sigmas: true}]",
        "sampler_steps=[1, 30]",
    )
    data = json.loads(json.dumps(dump(recipe)))
    assert data["shapes"] == {"batch": [1, 2, 4]}
    assert data["sampler_steps"] == [1, 30]
    assert data["verify"]["unet"] == {"min_snr_db": 30.0}
    again = Recipe.model_validate(data)
    assert again.model_dump() == recipe.model_dump()
    assert list(dump(recipe))[:5] == ["version", "name", "family", "source", "backend"]


def test_faults_between_fields_are_found_without_a_file_too() -> None:
    base = {"version": 1, "name": "a", "family": "sd", "source": "builtin:tiny", "backend": "stub"}
    with pytest.raises(ValidationError, match=r"defaults\.sampler: 'x' is not one of samplers"):
        Recipe.model_validate({**base, "defaults": {"sampler": "x"}})


def test_the_schema_lists_names_and_describes_every_field() -> None:
    found = schema(KNOWN)
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert found["properties"]["family"]["enum"] == ["sd"]
    assert found["properties"]["backend"]["enum"] == ["stub", "openvino", "reference"]
    assert found["properties"]["samplers"]["items"]["anyOf"][0]["enum"] == ["ddim", "euler", "dpmpp_2m", "lcm"]
    assert found["additionalProperties"] is False
    assert found["$defs"]["VerifyRecipe"]["properties"]["unet"] == {"$ref": "#/$defs/FloorRecipe"}
    assert found["$defs"]["VerifyRecipe"]["additionalProperties"] is False
    parts = [found, *found["$defs"].values()]
    bare = [
        name
        for part in parts
        for name, field in part["properties"].items()
        if "description" not in field and "$ref" not in field
    ]
    assert bare == []
    json.dumps(found, allow_nan=False)


def test_a_starter_recipe_loads(tmp_path: Path) -> None:
    for source in ("builtin:tiny", "hf://org/name@main", "my models/x: y #1", "- odd", "[x]", "'q'", 'no: "x"'):
        recipe = read(tmp_path, starter("sd", "openvino", "bf16", source, name="mine"))
        assert (recipe.name, recipe.backend, recipe.precision, recipe.source) == ("mine", "openvino", "bf16", source)
    assert read(tmp_path, starter("sd", "stub", "fp32", "builtin:tiny")).name == "sd-stub-fp32"


def test_every_commented_line_of_the_starter_is_a_valid_recipe_line(tmp_path: Path) -> None:
    text = starter("sd", "openvino", "bf16", "builtin:tiny")
    uncommented = re.sub(r"^# (?=(shapes|components|verify): )", "", text, flags=re.M)
    recipe = read(tmp_path, uncommented)
    assert recipe.shapes.batch == (1, 1, 4)
    assert recipe.verify.floors["unet"].min_snr_db == 30
