"""How far a value is from its reference, and how far it may be.

Numpy only (imported when something is measured, since the plan reads the floors), and one table
of floors: the numbers that `verify` refuses by, `sdcompile plan` shows and the parity tests assert
are these and no others. Knows no engine, no component and no file.

Every figure is finite, so that it can stand in JSON: decibels are clipped to +-200 (float32 holds
about 150 dB, so the ends mean "identical" and "nothing in common"), and a value that holds a NaN or
an infinity gets the worst figure there is, which no floor lets pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdcompile.spec import Precision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

IDENTICAL_DB = 200.0
WORST_DB = -200.0


@dataclass(frozen=True)
class Floor:
    """The least an engine's output must reach on every recorded sample."""

    min_snr_db: float
    min_cosine: float

    def holds(self, snr_db: float, cosine: float) -> bool:
        return snr_db >= self.min_snr_db and cosine >= self.min_cosine


# Measured on a full-size SD 1.5 UNet at 64x64 latents, engine against torch fp32, as |error| / |value|
# (x ~ -20 log10 in dB). Each floor sits below the worst of its row by a margin for trained weights and
# larger shapes, and above what a wrong layer gives: one weight of the smallest convolution off by its
# own size costs 20 dB and more.
#   fp32  1e-6 to 3e-6 (111 to 120 dB) on CPUs; TF32 matrix units, which GPUs call fp32, about 1e-3 (60 dB)
#   fp16  4e-3 (48 dB)
#   bf16  1e-2 in torch, 3e-2 in OpenVINO (40 and 30 dB)
#   int8  1.2e-1 (18 dB), NNCF with activations; 4e-2 with weights alone
# An SNR of s dB bounds the angle: cosine >= sqrt(1 - 10^(-s/10)). The cosine floors lie just under
# that, so they bind only when a recipe lowers the SNR floor (a gain that is off, say) and still wants
# the direction right.
FLOORS: dict[Precision, Floor] = {
    "fp32": Floor(min_snr_db=60.0, min_cosine=0.999999),
    "fp16": Floor(min_snr_db=35.0, min_cosine=0.9998),
    "bf16": Floor(min_snr_db=24.0, min_cosine=0.997),
    "int8": Floor(min_snr_db=12.0, min_cosine=0.965),
}

PRUNED = Floor(min_snr_db=0.0, min_cosine=0.0)
"""The floor of a pruned component, whose outputs are meant to differ: nearer to the reference than zeros are.

What pruning costs is measured, and a recipe may say what it must not exceed; a default would forbid pruning.
"""

PRUNED_IMAGE_DB = 0.0
"""Least PSNR of whole images where a component is pruned: they must be images, free of NaN."""

OTHER_DECODER_DB = 15.0
"""Mean PSNR of pictures of a decoder from another source to those of the model's own. On the tiny model its light
decoder has 33 dB; fed latents of permuted channels it has 12, and pictures of other prompts have 8."""

# Whole images drift further than one call does, because every step's error is fed to the next one.
IMAGE_FLOORS_DB: dict[Precision, float] = {"fp32": 45.0, "fp16": 30.0, "bf16": 20.0, "int8": 12.0}
"""Least PSNR of a whole image, by the lowest precision among the engines that made it."""


def snr_db(reference: ArrayLike, value: ArrayLike) -> float:
    """Signal to noise of `value` against `reference`: 10 log10(sum r^2 / sum (r - v)^2), in dB.

    Equal arrays give 200, a value with a NaN or infinity -200, and so does anything but zero against
    a reference of zeros. Raises ValueError when the shapes differ.
    """
    import numpy as np

    r, v = _pair(reference, value)
    if not (np.isfinite(r).all() and np.isfinite(v).all()):
        return WORST_DB
    return _ratio_db(float(np.vdot(r, r)), _square_error(r, v))


def psnr_db(reference: ArrayLike, value: ArrayLike) -> float:
    """Peak signal to noise of images in [0, 1]: 10 log10(1 / mean (r - v)^2), in dB."""
    import numpy as np

    r, v = _pair(reference, value)
    if not (np.isfinite(r).all() and np.isfinite(v).all()):
        return WORST_DB
    return _ratio_db(float(r.size), _square_error(r, v))


def cosine(reference: ArrayLike, value: ArrayLike) -> float:
    """Cosine of the angle between the arrays as vectors; two zero arrays agree (1), one alone does not (0).

    A NaN or infinity gives -1. Raises ValueError when the shapes differ.
    """
    import numpy as np

    r, v = _pair(reference, value)
    if not (np.isfinite(r).all() and np.isfinite(v).all()):
        return -1.0
    lengths = math.sqrt(float(np.vdot(r, r))) * math.sqrt(float(np.vdot(v, v)))
    if lengths == 0.0:
        return 1.0 if not (r.any() or v.any()) else 0.0
    return max(-1.0, min(1.0, float(np.vdot(r, v)) / lengths))


def max_abs(reference: ArrayLike, value: ArrayLike) -> float:
    """Greatest absolute difference. A NaN counts as infinity, so the result may be `inf`."""
    import numpy as np

    r, v = _pair(reference, value)
    if r.size == 0:
        return 0.0
    return float(np.max(np.abs(r - v))) if np.isfinite(r).all() and np.isfinite(v).all() else math.inf


def is_finite(value: ArrayLike) -> bool:
    import numpy as np

    return bool(np.isfinite(np.asarray(value)).all())


def _pair(reference: ArrayLike, value: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    import numpy as np

    # float64 throughout: at 120 dB the squared error of float32 sums is made of rounding.
    r, v = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    if r.shape != v.shape:
        raise ValueError(f"shape {v.shape} where the reference has {r.shape}")
    return r.ravel(), v.ravel()


def _square_error(r: NDArray[np.float64], v: NDArray[np.float64]) -> float:
    return float(((r - v) ** 2).sum())


def _ratio_db(signal: float, noise: float) -> float:
    if noise == 0.0:
        return IDENTICAL_DB
    if signal == 0.0:
        return WORST_DB
    return max(WORST_DB, min(IDENTICAL_DB, 10.0 * (math.log10(signal) - math.log10(noise))))
