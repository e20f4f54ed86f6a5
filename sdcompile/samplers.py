"""The short names of samplers: which diffusers scheduler each one stands for.

A row is data; adding a scheduler is adding a row. Standard library only, so that recipes and
plans may import it. It refuses to know how a scheduler works: `steps.sampler` runs the real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SamplerRow:
    """A diffusers scheduler class, and what of its config the short name itself fixes.

    Everything else comes from the source model's scheduler config, as when a diffusers user
    switches schedulers with `from_config`.
    """

    scheduler: str
    config: Mapping[str, Any] = field(default_factory=dict)


SAMPLERS: dict[str, SamplerRow] = {
    "ddim": SamplerRow("DDIMScheduler"),
    "ddpm": SamplerRow("DDPMScheduler"),
    "pndm": SamplerRow("PNDMScheduler"),
    "lms": SamplerRow("LMSDiscreteScheduler"),
    "euler": SamplerRow("EulerDiscreteScheduler"),
    "euler_ancestral": SamplerRow("EulerAncestralDiscreteScheduler"),
    "heun": SamplerRow("HeunDiscreteScheduler"),
    "kdpm2": SamplerRow("KDPM2DiscreteScheduler"),
    "kdpm2_ancestral": SamplerRow("KDPM2AncestralDiscreteScheduler"),
    "dpmpp_2m": SamplerRow("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2s": SamplerRow("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_sde": SamplerRow("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "deis": SamplerRow("DEISMultistepScheduler"),
    "unipc": SamplerRow("UniPCMultistepScheduler"),
    "lcm": SamplerRow("LCMScheduler"),
    "tcd": SamplerRow("TCDScheduler"),
    "sasolver": SamplerRow("SASolverScheduler"),
    "ipndm": SamplerRow("IPNDMScheduler"),
}
