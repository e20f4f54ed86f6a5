"""Which parts of a model bear int8: the noise each group alone adds, and the groups to leave out, few of them.

Groups are quantized one at a time, run on held out samples and compared with the graph before
quantization (what an earlier pass has cost is not theirs). Their noise adds up nearly, as the errors
of different layers have little to do with each other, so that one row of figures per group predicts
every mix; the mix chosen is then measured itself. It knows ONNX Runtime as a calculator only: pairs run
as float arithmetic, which is what int8 kernels compute up to rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdcompile import metrics
from sdcompile.errors import StageError
from sdcompile.passes import calculator, qdq
from sdcompile.samples import Samples
from sdcompile.spec import Say

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Noise = NDArray[np.float64]

# A part in 10^5 more noise than the floor allows is the rounding of a sum, not a miss.
_SLACK = 1e-5


@dataclass(frozen=True)
class Judge:
    """Held out samples, what the float graph answers to them, and a graph with every pair that variants are made from.

    `noise` of a variant: per sample, sum (answer - value)^2 / sum answer^2, of its worst output.
    """

    samples: Samples
    names: tuple[str, ...]
    graph: Path
    answers: tuple[Mapping[str, NDArray[Any]], ...]

    @property
    def regions(self) -> list[str | None]:
        return [self.samples.rows[name]["region"] for name in self.names]

    def noise(self, kept: Collection[str] | None) -> Noise:
        """With only the groups `kept` quantized; None = all of them."""
        import onnx_ir as ir

        path = self.graph
        if kept is not None:
            model = qdq.load(self.graph)
            qdq.keep_only(model, kept)
            # Beside the graph, because both refer to the same file of weights.
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
    return Judge(samples, chosen, graph, tuple(answers(source, samples, chosen)))


def answers(path: Path, samples: Samples, names: Sequence[str]) -> Iterator[dict[str, NDArray[Any]]]:
    """What the graph at `path` gives for each sample, with pairs computed in float."""
    session = calculator.session(path)
    outputs = [output.name for output in session.get_outputs()]
    for name in names:
        yield dict(zip(outputs, session.run(outputs, dict(samples[name].feeds)), strict=True))


def snr_by_region(noise: Noise, regions: Sequence[str | None]) -> dict[str, float]:
    """Region (or "all" for components without timesteps) -> the lowest SNR in dB."""
    found: dict[str, float] = {}
    for value, region in zip(noise, regions, strict=True):
        level = round(-10 * float(np.log10(max(float(value), 1e-20))), 2)
        found[region or "all"] = min(level, found.get(region or "all", level))
    return dict(sorted(found.items(), key=lambda row: ("early", "mid", "late", "all").index(row[0])))


def measure(judge: Judge, groups: Mapping[str, list[str]], say: Say) -> dict[str, Noise]:
    """Group -> noise with that group alone quantized."""
    found = {}
    for number, name in enumerate(groups):
        say(f"sensitivity of {name} ({number + 1} of {len(groups)})", number / len(groups))
        found[name] = judge.noise({name})
    return found


def choose(
    judge: Judge, alone: Mapping[str, Noise], everything: Noise, min_snr_db: float, say: Say
) -> tuple[list[str], Noise]:
    """Groups to leave out so that every sample keeps `min_snr_db`, and the noise that remains.

    Left out is, again and again, the group that adds most to the sample that is worst off; the sum is scaled
    to what was measured last. Then each is taken back that a later one made needless, so that none is left out
    for nothing. Raises StageError when even the least sensitive group alone misses the floor.
    """
    allowed = most_noise(min_snr_db)
    left_out: list[str] = []
    noise = everything
    scale = _ratio(everything, alone, left_out)
    while noise.max() > allowed:
        predicted = noise
        while predicted.max() > allowed:
            rest = [name for name in alone if name not in left_out]
            if len(rest) <= 1:
                raise StageError(
                    f"the budget of {min_snr_db:g} dB cannot be held by any int8: with all but the least sensitive "
                    f"group ({rest[0]}) left out the SNR is {-10 * np.log10(predicted.max()):.1f} dB",
                    "lower `quantize: {budget: {min_snr_db: ...}}`, or build the component in another precision",
                )
            worst = int(predicted.argmax())
            left_out.append(max(rest, key=lambda name: alone[name][worst]))
            predicted = scale * sum(alone[name] for name in alone if name not in left_out)
        say(f"measuring int8 without {len(left_out)} of {len(alone)} groups", None)
        noise = judge.noise(set(alone) - set(left_out))
        scale = _ratio(noise, alone, left_out)
    return _without_needless(judge, alone, left_out, noise, allowed, say)


def most_noise(min_snr_db: float) -> float:
    """The noise up to which a sample keeps `min_snr_db`."""
    return float(10 ** (-min_snr_db / 10) * (1 + _SLACK))


def _without_needless(
    judge: Judge, alone: Mapping[str, Noise], left_out: list[str], noise: Noise, allowed: float, say: Say
) -> tuple[list[str], Noise]:
    """`left_out` without those that can be taken back, the least sensitive first, and the noise that remains."""
    for name in sorted(left_out, key=lambda name: float(alone[name].max())):
        others = [other for other in left_out if other != name]
        kept = [row for other, row in alone.items() if other not in others]
        if (_ratio(noise, alone, left_out) * np.sum(kept, 0)).max() > allowed:
            continue
        say(f"measuring int8 with {name} again", None)
        measured = judge.noise(set(alone) - set(others))
        if measured.max() <= allowed:
            left_out, noise = others, measured
    return left_out, noise


def _ratio(noise: Noise, alone: Mapping[str, Noise], left_out: Collection[str]) -> Noise:
    """Per sample: what was measured over the sum of what the groups add alone."""
    total = sum((row for name, row in alone.items() if name not in left_out), np.zeros_like(noise))
    return noise / np.maximum(total, 1e-20)


def report(
    judge: Judge, groups: Mapping[str, list[str]], alone: Mapping[str, Noise], everything: Noise,
    left_out: Sequence[str], chosen: Noise,
) -> dict[str, Any]:  # fmt: skip
    """sensitivity.json: lowest SNR in dB by timestep region: all quantized, the mix, each group alone, worst first."""
    regions = judge.regions
    order = sorted(alone, key=lambda name: -float(alone[name].max()))
    return {
        "component": judge.samples.component,
        "samples": len(judge.names),
        "all": snr_by_region(everything, regions),
        "chosen": snr_by_region(chosen, regions),
        "left_out": list(left_out),
        "groups": [
            {"name": name, "operators": len(groups[name]), "snr_db": snr_by_region(alone[name], regions)}
            for name in order
        ],
    }
