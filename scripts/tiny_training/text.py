"""Tokenizer and text encoder, and the lesson that teaches the encoder its grammar before diffusion.

Learnt from the diffusion loss alone, text understanding comes very late on so small a budget. So the
encoder first learns to say, in linear reach of its outputs, what each caption means: at every noun its
size, colour and shape, and after the end of the text (CLIP pads with the end token) the whole scene,
the first thing, the second thing and again the whole scene.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdcompile.models.tiny import scenes
from tiny_training.muon import muon
from tiny_training.running import Clock, load, save

TOKENS = 24
WIDTH = 128


def letters_of_bytes() -> list[str]:
    """The 256 printable letters CLIP writes bytes as, in the order of its vocabulary (Radford 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(256 - len(plain))]


def lexicon() -> list[str]:
    """Every word a caption can hold."""
    phrases = [
        *scenes.RADII_PX,
        *scenes.COLOURS,
        *scenes.SHAPES,
        *scenes.RELATIONS,
        *scenes.PLACES,
        "a an on with background ,",
    ]
    return sorted({word for phrase in phrases for word in phrase.split()})


def merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until each word is one token."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    found = []
    while any(len(parts) > 1 for parts in split):
        counts = Counter(pair for parts in split for pair in pairwise(parts))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        found.append(best)
        for parts in split:
            index = 0
            while index < len(parts) - 1:
                if (parts[index], parts[index + 1]) == best:
                    parts[index : index + 2] = ["".join(best)]
                index += 1
    return found


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json and merges.txt in CLIP's layout, and what transformers adds to them."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = letters_of_bytes()
    joined = merges(lexicon())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in joined)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in joined)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    special = {name: settings[name] for name in settings if name.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", "utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def build(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            hidden_act="quick_gelu",
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """(captions, 24) token numbers, padded as every SD pipeline pads."""
    return tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


# Where a thing is: the two of a pair stand at opposite sides, which the relation names.
_SIDES = ("", "in the center", "at the top", "at the bottom", "on the left", "on the right")
_OF_PAIR = {"above": (2, 3), "below": (3, 2), "to the left of": (4, 5), "to the right of": (5, 4)}
_KINDS = (3, len(scenes.OBJECT_COLOURS), len(scenes.SHAPES), len(_SIDES))
IGNORED = -100


def meaning(scene: scenes.Scene) -> list[int]:
    """The scene as class numbers: background, then size, colour, shape and side of each thing."""
    sides = _OF_PAIR.get(scene.where) or (_SIDES.index(scene.where),)
    classes = [scenes.BACKGROUNDS.index(scene.background)]
    for thing, side in zip(scene.things, sides, strict=True):
        classes += [
            tuple(scenes.RADII_PX).index(thing.size),
            scenes.OBJECT_COLOURS.index(thing.colour),
            scenes.SHAPES.index(thing.shape),
            side,
        ]
    return classes + [IGNORED] * (9 - len(classes))


class Lesson(torch.nn.Module):
    """Linear heads over the encoder's outputs, and the loss of reading a scene from them."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.end = tokenizer.eos_token_id
        nouns = tokenizer(list(scenes.SHAPES), add_special_tokens=False).input_ids
        self.register_buffer("nouns", torch.tensor(nouns).flatten())
        whole = (len(scenes.BACKGROUNDS), *_KINDS, *_KINDS)
        self.widths = {"whole": whole, "again": whole, "one": _KINDS, "two": _KINDS, "noun": _KINDS[:3]}
        self.heads = torch.nn.ModuleDict(
            {name: torch.nn.Linear(WIDTH, sum(widths)) for name, widths in self.widths.items()}
        )

    def _read(self, name: str, states: torch.Tensor, classes: torch.Tensor) -> tuple:
        loss, right, asked = 0.0, 0, 0
        split = self.heads[name](states).split(list(self.widths[name]), dim=1)
        for scores, wanted in zip(split, classes.T, strict=True):
            told = wanted != IGNORED
            loss = loss + functional.cross_entropy(scores[told], wanted[told])
            right += int((scores[told].argmax(1) == wanted[told]).sum())
            asked += int(told.sum())
        return loss, right, asked

    def forward(self, ids: torch.Tensor, states: torch.Tensor, classes: torch.Tensor) -> tuple:
        """Loss and share of right answers for (N, 24) ids, (N, 24, 128) states, (N, 9) classes."""
        row = torch.arange(len(ids))
        ends = (ids == self.end).int().argmax(1)
        is_noun = torch.isin(ids, self.nouns)
        pair = classes[:, 5] != IGNORED
        is_first = is_noun & (is_noun.cumsum(1) == 1)
        is_second = is_noun & (is_noun.cumsum(1) == 2)
        read = [
            self._read("whole", states[row, ends], classes),
            self._read("one", states[row, ends + 1], classes[:, 1:5]),
            self._read("two", states[row, ends + 2][pair], classes[pair, 5:]),
            self._read("again", states[:, -1], classes),
            self._read("noun", states[is_first], classes[:, 1:4]),
            self._read("noun", states[is_second], classes[pair, 5:8]),
        ]
        loss, right, asked = (sum(column) for column in zip(*read, strict=True))
        return loss / 10, right / asked


def captioned(rng: np.random.Generator, count: int, split: str = "train"):
    """Captions and their (count, 9) meanings."""
    drawn = [scenes.sample_scene(rng, split) for _ in range(count)]
    captions = [scenes.caption(scene, scenes.sample_wording(rng)) for scene in drawn]
    return captions, torch.tensor([meaning(scene) for scene in drawn])


def teach(folder: Path, tokenizer: CLIPTokenizer, minutes: float, seed: int = 2, lr: float = 2e-3) -> CLIPTextModel:
    """Train the encoder on the lesson. Too short a stage for checkpoints: only its end is kept."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    encoder, lesson = build(tokenizer), Lesson(tokenizer)
    state = load(folder / "text.pt")
    if state:
        encoder.load_state_dict(state)
        return encoder
    optimiser = muon([encoder, lesson], lr)
    held, held_classes = captioned(np.random.default_rng(seed + 1), 512, "held_out")
    clock, step = Clock("text", minutes), 0
    while clock.done < 1:
        captions, classes = captioned(rng, 128)
        ids = tokens(tokenizer, captions)
        loss, right = lesson(ids, encoder(ids).last_hidden_state, classes)
        loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = clock.rate(lr, step)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if clock.due() or clock.done == 1:
            with torch.no_grad():
                ids = tokens(tokenizer, held)
                _, held_right = lesson(ids, encoder(ids).last_hidden_state, held_classes)
            clock.say(f"step {step}, loss {loss:.4f}, right {right:.3f}, held out {held_right:.4f}")
    save(folder / "text.pt", encoder.state_dict())
    return encoder
