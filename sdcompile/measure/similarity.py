"""How far two pictures are apart, as people see it: PSNR, SSIM and GMSD; needs no weights.

Pictures are (H, W, 3) floats in [0, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sdcompile import metrics
from sdcompile.errors import HostError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

# ITU-R BT.601, as SSIM's and GMSD's authors make grey pictures.
_LUMA = np.array([0.299, 0.587, 0.114])
_GMSD_C = 170.0 / 255.0**2


def distances(reference: Floats, picture: Floats) -> dict[str, float]:
    """{"psnr_db", "ssim", "gmsd"} of `picture` against `reference`.

    ssim is 1 for equal pictures and falls; gmsd is 0 for equal ones and rises. Raises HostError
    where torchmetrics is missing.
    """
    return {
        "psnr_db": round(metrics.psnr_db(reference, picture), 3),
        "ssim": round(ssim(reference, picture), 5),
        "gmsd": round(gmsd(reference, picture), 5),
    }


def ssim(reference: Floats, picture: Floats) -> float:
    """Structural similarity (Wang et al. 2004), by torchmetrics, over the three channels."""
    try:
        import torch
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise HostError(f"SSIM cannot be measured here: {error}", "pip install 'sdcompile[compile,eval]'") from error
    first, second = (
        # float64: variances are differences here, and in float32 equal pictures would not be quite equal.
        torch.from_numpy(np.ascontiguousarray(side.transpose(2, 0, 1)[None], np.float64))
        for side in (picture, reference)
    )
    found = structural_similarity_index_measure(first, second, data_range=1.0)
    assert isinstance(found, torch.Tensor)  # a tuple comes only when maps are asked for too
    return float(found)


def gmsd(reference: Floats, picture: Floats) -> float:
    """Gradient magnitude similarity deviation (Xue et al. 2014): what LPIPS is for, without learned weights.

    Means over 2 x 2 pixels, Prewitt gradients m; gms = (2 m_r m_p + c) / (m_r^2 + m_p^2 + c); its standard deviation.
    """
    first, second = _gradient(reference), _gradient(picture)
    gms = (2 * first * second + _GMSD_C) / (first**2 + second**2 + _GMSD_C)
    return float(gms.std())


def _gradient(picture: Floats) -> NDArray[np.float64]:
    grey = np.asarray(picture, np.float64) @ _LUMA
    height, width = (side // 2 * 2 for side in grey.shape)
    small = grey[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))
    rows, columns = small[:, 2:] - small[:, :-2], small[2:, :] - small[:-2, :]
    across = (rows[2:] + rows[1:-1] + rows[:-2]) / 3
    down = (columns[:, 2:] + columns[:, 1:-1] + columns[:, :-2]) / 3
    return np.hypot(across, down)
