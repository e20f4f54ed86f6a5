"""Which parts of a model bear int8: the noise each group alone adds, and the groups to leave out, few of them.

Groups are quantized one at a time, run on held out samples and compared with the graph before
quantization (what an earlier pass has cost is not theirs). Their noise adds up nearly, as the errors
of different layers have little to do with each other, so that one row of figures per group predicts
every mix; the mix chosen is then measured itself. It knows ONNX Runtime as a calculator only: pairs run
as float arithmetic, which is what int8 kernels compute up to rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile import metrics
from sdcompile.errors import StageError
from sdcompile.passes import calculator, casting, qdq
from sdcompile.samples import Samples
from sdcompile.spec import Say

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    Noise = NDArray[np.float64]

# A part in 10^5 more noise than the floor allows is the rounding of a sum, not a miss.
_SLACK = 1e-5


@dataclass(frozen=True)
class Judge:
    """Held out samples, what the float graph answers to them, and a graph with every pair that variants are made from.

    `rounded` are its quantized weights as they are read, in a file beside it (`qdq.rounded_weights`).
    `noise` of a variant: per sample, sum (answer - value)^2 / sum answer^2, of its worst output.
    """

    samples: Samples
    names: tuple[str, ...]
    graph: Path
    answers: tuple[Mapping[str, NDArray[Any]], ...]
    rounded: Mapping[str, ir.ExternalTensor]

    def again(self) -> Judge:
        """The same, of a graph that was written anew."""
        return replace(self, rounded=_rounded(self.graph))

    @property
    def regions(self) -> list[str | None]:
        return [self.samples.rows[name]["region"] for name in self.names]

    def noise(self, kept: Collection[str] | None) -> Noise:
        """With only the groups `kept` quantized; None = all of them."""
        import onnx_ir as ir

        model = qdq.load(self.graph)
        if kept is not None:
            qdq.keep_only(model, kept)
        qdq.round_weights(model, self.rounded)
        # Beside the graph, because both refer to the same files of weights.
        path = self.graph.with_name("variant.onnx")
        ir.save(model, path)
        pairs = zip(self.answers, answers(path, self.samples, self.names), strict=True)
        return np.array([max(10 ** (-metrics.snr_db(a[k], value[k]) / 10) for k in a) for a, value in pairs])


def judge(samples: Samples, count: int, graph: Path, source: Path) -> Judge:
    """A judge of `count` samples spread evenly over timesteps; `source` is the float graph."""
    names = sorted(samples.rows, key=lambda name: (-(samples.rows[name]["timestep"] or 0), name))
    if not names:
        raise StageError(
            f"{samples.component}: no sample is held out, so nothing can be measured",
            "raise `calibrate: {images: ...}` (every fourth trajectory is held out) or `max_samples`",
        )
    wanted = min(count, len(names))
    chosen = tuple(names[i * len(names) // wanted] for i in range(wanted))
    return Judge(samples, chosen, graph, tuple(answers(source, samples, chosen)), _rounded(graph))


def _rounded(graph: Path) -> dict[str, ir.ExternalTensor]:
    model = qdq.load(graph)
    casting.map_weights(model, graph.parent)
    return qdq.rounded_weights(model, graph.parent, "rounded.data")


def answers(path: Path, samples: Samples, names: Sequence[str]) -> Iterator[dict[str, NDArray[Any]]]:
    """What the graph at `path` gives for each sample, with pairs computed in float."""
    session = calculator.session(path)
    outputs = [output.name for output in session.get_outputs()]
    for name in names:
        rows = [session.run(outputs, feeds) for feeds in calculator.calls(session, samples[name].feeds)]
        yield dict(zip(outputs, map(np.concatenate, zip(*rows, strict=True)), strict=True))


def snr_by_region(noise: Noise, regions: Sequence[str | None]) -> dict[str, float]:
    """Region (or "all" for components without timesteps) -> the lowest SNR in dB."""
    found: dict[str, float] = {}
    for value, region in zip(noise, regions, strict=True):
        level = round(-10 * float(np.log10(max(float(value), 1e-20))), 2)
        found[region or "all"] = min(level, found.get(region or "all", level))
    return dict(sorted(found.items(), key=lambda row: ("early", "mid", "late", "all").index(row[0])))


@dataclass
class Parts:
    """Parts of a model that hold all of its groups between them, and the noise each of them alone adds.

    A part is one group, or a block of several (`closed`, with their names) that nobody has looked into yet.
    """

    judge: Judge
    groups: tuple[str, ...]
    noise: dict[str, Noise]
    closed: dict[str, list[str]]

    def open(self, block: str, say: Say) -> None:
        """Measure the groups of a block one by one, in its place."""
        found = {}
        inside = self.closed.pop(block)
        for number, name in enumerate(inside):
            say(f"sensitivity of {name} ({number + 1} of {len(inside)} in {block})", None)
            found[name] = self.judge.noise({name})
        del self.noise[block]
        self.noise |= found

    def without(self, left_out: Collection[str]) -> Noise:
        """Measured: the noise with all groups but these quantized."""
        return self.judge.noise(set(self.groups) - set(left_out))


def measure(judge: Judge, groups: Collection[str], say: Say, *, blocks: bool = False) -> Parts:
    """The noise of each of `groups`, or of `blocks` of them: what has the first two names of its path in common."""
    parts: dict[str, list[str]] = {}
    for group in groups:
        parts.setdefault(".".join(group.split(".")[:2]) if blocks else group, []).append(group)
    parts = {names[0] if len(names) == 1 else part: names for part, names in parts.items()}
    noise = {}
    for number, (part, names) in enumerate(parts.items()):
        say(f"sensitivity of {part} ({number + 1} of {len(parts)})", number / len(parts))
        noise[part] = judge.noise(set(names))
    return Parts(judge, tuple(groups), noise, {part: names for part, names in parts.items() if len(names) > 1})


def choose(parts: Parts, everything: Noise, min_snr_db: float, say: Say) -> tuple[list[str], Noise]:
    """Groups to leave out so that every sample keeps `min_snr_db`, and the noise that remains.

    Left out is, again and again, the group that adds most to the sample that is worst off; the sum is scaled
    to what was measured last. A block that adds most is opened: as noise adds up (nearly), no group in another one
    adds more than that block does, so that the groups of most blocks are never measured. Then each is taken back that
    a later one made needless, so that none is left out for nothing. Raises StageError when even the least sensitive
    group alone misses the floor.
    """
    allowed = most_noise(min_snr_db)
    alone = parts.noise
    left_out: list[str] = []
    noise = everything
    while noise.max() > allowed:
        predicted, measured_without = noise, tuple(left_out)
        while predicted.max() > allowed:
            rest = [name for name in alone if name not in left_out]
            worst = int(predicted.argmax())
            most = max(rest, key=lambda name: alone[name][worst])
            if most in parts.closed:
                parts.open(most, say)
            elif len(rest) <= 1:
                raise StageError(
                    f"the budget of {min_snr_db:g} dB cannot be held by any int8: with all but the least sensitive "
                    f"group ({rest[0]}) left out the SNR is {-10 * np.log10(predicted.max()):.1f} dB",
                    "lower `quantize: {budget: {min_snr_db: ...}}`, or build the component in another precision",
                )
            else:
                left_out.append(most)
            scale = _ratio(noise, alone, measured_without)
            predicted = scale * sum(alone[name] for name in alone if name not in left_out)
        say(f"measuring int8 without {len(left_out)} of {len(parts.groups)} groups", None)
        noise = parts.without(left_out)
    return _without_needless(parts, left_out, noise, allowed, say)


def most_noise(min_snr_db: float) -> float:
    """The noise up to which a sample keeps `min_snr_db`."""
    return float(10 ** (-min_snr_db / 10) * (1 + _SLACK))


def _without_needless(
    parts: Parts, left_out: list[str], noise: Noise, allowed: float, say: Say
) -> tuple[list[str], Noise]:
    """`left_out` without those that can be taken back, the least sensitive first, and the noise that remains."""
    alone = parts.noise
    for name in sorted(left_out, key=lambda name: float(alone[name].max())):
        others = [other for other in left_out if other != name]
        kept = [row for other, row in alone.items() if other not in others]
        if (_ratio(noise, alone, left_out) * np.sum(kept, 0)).max() > allowed:
            continue
        say(f"measuring int8 with {name} again", None)
        measured = parts.without(others)
        if measured.max() <= allowed:
            left_out, noise = others, measured
    return left_out, noise


def _ratio(noise: Noise, alone: Mapping[str, Noise], left_out: Collection[str]) -> Noise:
    """Per sample: what was measured over the sum of what the groups add alone."""
    total = sum((row for name, row in alone.items() if name not in left_out), np.zeros_like(noise))
    return noise / np.maximum(total, 1e-20)


def report(
    parts: Parts, groups: Mapping[str, list[str]], everything: Noise, left_out: Sequence[str], chosen: Noise
) -> dict[str, Any]:
    """sensitivity.json: lowest SNR in dB by timestep region: all quantized, the mix, each part alone, worst first.

    `groups`: group -> its operators. A block that was not opened is one row, and its `groups` says how many it has.
    """
    judge, alone, regions = parts.judge, parts.noise, parts.judge.regions
    inside = {name: parts.closed.get(name, [name]) for name in alone}
    order = sorted(alone, key=lambda name: -float(alone[name].max()))
    return {
        "component": judge.samples.component,
        "samples": len(judge.names),
        "all": snr_by_region(everything, regions),
        "chosen": snr_by_region(chosen, regions),
        "left_out": list(left_out),
        "groups": [
            {
                "name": name,
                "groups": len(inside[name]),
                "operators": sum(len(groups[g]) for g in inside[name]),
                "snr_db": snr_by_region(alone[name], regions),
            }
            for name in order
        ],
    }
