"""What every pass of the prune stage does around its own idea: open, feed, save, and measure what it did.

A pruned checkpoint is read back before it is judged, so the figures in effect.json are those of the
files that later steps will read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompile import checkpoint, edits, metrics
from sdcompile.errors import StageError
from sdcompile.passes.base import write_effect
from sdcompile.samples import Samples
from sdcompile.spec import Job

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sdcompile.passes.base import Setting

POSITIONS = 16384
"""Latent positions of one call that recorded rows are gathered into: 64 rows of 16 x 16, 4 of 64 x 64."""


@dataclass(frozen=True)
class Subject:
    """A component that is being pruned.

    module   takes the spec's inputs in order, returns its output
    model    the diffusers model inside it, whose names the weights and the edits have
    edits    what had been taken out before
    """

    module: nn.Module
    model: nn.Module
    edits: list[dict[str, Any]]


def open_subject(folder: Path, job: Job) -> Subject:
    """The checkpoint in `folder`, which must be a UNet's. Raises StageError when it is another component's."""
    module = checkpoint.load(job.params["family"], job.component, folder, job.params)
    model = getattr(module, "unet", None)
    if model is None:
        raise StageError(
            f"{job.component} has no attention heads, resnets and blocks that a pass of the prune stage knows",
            "`prune:` is for the unet",
        )
    return Subject(module, model, edits.read(folder))


def calls_of(samples: Samples, job: Job) -> list[tuple[Tensor, ...]]:
    """The recorded inputs, in the spec's order, rows of equal shape gathered into calls of up to `POSITIONS`.

    Raises StageError when nothing was recorded, or values are not finite.
    """
    return [feeds for feeds, _ in _gathered(samples, job)]


def pairs_of(samples: Samples, job: Job) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """As `calls_of`, with the reference's answers."""
    return list(_gathered(samples, job))


def _gathered(samples: Samples, job: Job) -> Iterable[tuple[tuple[Tensor, ...], Tensor]]:
    import torch

    assert job.spec is not None
    if not len(samples):
        raise StageError(
            f"no sample of {job.component} was recorded", "raise `calibrate.images` and `calibrate.max_samples`"
        )
    names, out = [t.name for t in job.spec.inputs], job.spec.outputs[0].name
    groups: dict[tuple[int, ...], list[tuple[str, int]]] = {}
    for sample in samples.rows:
        shapes = samples.shapes(sample)
        alike = tuple(n for name in names for n in (0, *shapes[f"in.{name}"][1:]))
        groups.setdefault(alike, []).append((sample, shapes[f"out.{out}"][0]))
    for rows in groups.values():
        total = sum(count for _, count in rows)
        # Trajectories are recorded one after the other; a fixed shuffle gives every call some of each.
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        place = torch.empty_like(order)
        place[order] = torch.arange(total)
        columns: list[Tensor] = []
        start = 0
        for sample, count in rows:
            read = samples[sample]
            arrays = [torch.from_numpy(a) for a in (*(read.feeds[name] for name in names), read.outputs[out])]
            # Straight to where the shuffle puts them: what is recorded is in memory once.
            columns = columns or [a.new_empty((total, *a.shape[1:])) for a in arrays]
            for column, array in zip(columns, arrays, strict=True):
                column[place[start : start + count]] = array
            start += count
        for part in parts_of(tuple(columns), POSITIONS):
            yield part[:-1], part[-1]


def parts_of(call: tuple[Tensor, ...], positions: int) -> list[tuple[Tensor, ...]]:
    """The rows of `call` in parts, views of it, of up to so many positions of its first column; one row at least."""
    first = call[0]
    rows = max(1, positions // (first.shape[-1] * first.shape[-2] if first.ndim == 4 else 1))
    return list(zip(*(column.split(rows) for column in call), strict=True))


_GRADIENT_BYTES = 1500
"""What gradients keep of a UNet's activations: bytes per latent position and channel of the first level.

Counted on fake tensors: 1430 to 1450 for SD 1.5 (32 x 32 to 96 x 96 latents), 1424 for SD 2.1, 370 for the tiny model.
"""


def gradients_gib(setting: Setting, rows: int, positions: int) -> float:
    """GiB that gradients keep in calls of `rows` rows of the largest size that come in parts of `positions`."""
    size = setting.shapes["h"].max * setting.shapes["w"].max
    at_once = min(rows, max(1, positions // size)) * size
    return float(at_once * setting.config["block_out_channels"][0] * _GRADIENT_BYTES / (1 << 30))


def finish(
    inputs: Mapping[str, Path],
    out: Path,
    job: Job,
    subject: Subject,
    new: list[Any],
    same_weights: bool = False,
    config: Mapping[str, Any] | None = None,
    **detail: Any,
) -> None:
    """Save the edited model of `subject` into `out` and write effect.json.

    new            the edits this pass made, after those made before
    same_weights   the weights are those of the source: they are linked, not written again
    config         fields of config.json that say what the edits do not
    detail         what the pass has to tell besides

    SNR is that of the saved checkpoint against the fp32 reference's recorded answers on held-out samples; there
    is none for a pass that asked for no samples.
    """
    source = inputs["checkpoint"]
    before = macs(open_subject(source, job), job)
    job.say("writing the weights that are left", None)
    if same_weights:
        why = checkpoint.relabel(source, out, [*subject.edits, *new])
    else:
        why = checkpoint.save(subject.model, source, out, [*subject.edits, *new], config)
    saved = open_subject(out, job)
    found = {}
    if "samples" in inputs:
        job.say("measuring on held-out samples", None)
        found = by_region(saved.module, Samples(inputs["samples"], job.component, held_out=True), job)
    old, left = checkpoint.parameter_bytes(source), checkpoint.parameter_bytes(out)
    write_effect(
        out,
        parameters=(old[0], left[0]),
        size_bytes=(old[1], left[1]),
        macs=(before, macs(saved, job)),
        snr_db={region: worst for region, (worst, _) in found.items()},
        mean_snr_db={region: mean for region, (_, mean) in found.items()},
        edits=new,
        diffusers=why or "an ordinary diffusers folder",
        **detail,
    )


def by_region(module: nn.Module, samples: Samples, job: Job) -> dict[str, tuple[float, float]]:
    """Timestep region -> (lowest, mean) SNR in dB of `module` against the recorded answers."""
    import torch

    assert job.spec is not None
    found: dict[str, list[float]] = {}
    with torch.inference_mode():
        for sample in samples:
            output = module(*(torch.tensor(sample.feeds[t.name]) for t in job.spec.inputs))
            snr = metrics.snr_db(sample.outputs[job.spec.outputs[0].name], output.numpy())
            found.setdefault(sample.told["region"] or "all", []).append(snr)
    return {region: (round(min(v), 2), round(sum(v) / len(v), 2)) for region, v in found.items()}


def macs(subject: Subject, job: Job) -> int:
    """Multiply-accumulates of one call at the usual shapes: counted on shapes alone, nothing is computed."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    assert job.spec is not None
    aten: Any = torch.ops.aten

    def attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    # The counter knows the attention kernels of GPUs only.
    mapping = {aten._scaled_dot_product_flash_attention_for_cpu: attention}
    feeds = [torch.zeros(t.shape(job.shapes, "opt"), dtype=getattr(torch, t.dtype)) for t in job.spec.inputs]
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake, counter:
        subject.module(*(fake.from_tensor(feed) for feed in feeds))
    return int(counter.get_total_flops() // 2)
