"""What a bundle is compiled for, and which options ask for more: said before a request is made.

A recipe's defaults and profiles are held against it when the recipe is read, a bundle's profiles.json
when the bundle is opened.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdcompile.runtime import values
from sdcompile.runtime.options import Options
from sdcompile.runtime.tables import spans


@dataclass(frozen=True)
class Offer:
    """samplers: name -> step counts; the sampler and number of steps of a request that names none; widths of the
    denoiser (None: not known)."""

    samplers: Mapping[str, Collection[int]]
    sampler: str
    num_inference_steps: int
    widths: Collection[str] | None = None

    def faults(self, options: Options) -> Iterator[tuple[str, str]]:
        """(option, what is wrong with it) for every sampler, number of steps and width that is not compiled."""
        if self.widths is not None and options.unet_width is not None and options.unet_width not in self.widths:
            yield "unet_width", unknown_width(options.unet_width, self.widths)
        option = "stages" if options.stages is not None else "sampler"
        if options.stages is not None:
            names = tuple(dict.fromkeys(stage.sampler for stage in values.stages(options.stages)))
        else:
            names = (self.sampler if options.sampler is None else options.sampler,)
        unknown = [name for name in names if name not in self.samplers]
        for name in unknown:
            near = difflib.get_close_matches(str(name), self.samplers, 1)
            yield (
                option,
                f"{name!r} is not one of samplers"
                + (f", did you mean {near[0]!r}?" if near else f" ({', '.join(self.samplers)})"),
            )
        steps = self.num_inference_steps if options.num_inference_steps is None else options.num_inference_steps
        for name in () if unknown else names:
            compiled = self.samplers[name]
            # A sampler fitted for one number of steps is asked for that, where nobody says another.
            if steps in compiled or (len(compiled) == 1 and options.num_inference_steps is None and len(names) == 1):
                continue
            place = option if options.num_inference_steps is None else "num_inference_steps"
            yield place, f"sampler {name} is compiled for {spans(compiled)} steps, not for {steps}"


def unknown_width(name: Any, widths: Collection[str]) -> str:
    """The words for a width that is not built."""
    near = difflib.get_close_matches(str(name), widths, 1)
    return f"{name!r} is not one of its widths ({', '.join(widths)})" + (f", did you mean {near[0]!r}?" if near else "")
