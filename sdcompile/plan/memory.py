"""How much memory the kinds of steps need: (times the component's fp32 bytes, plus GiB), peak resident.

Measured on SD 1.5 at 512x512, whose UNet is 3.2 GiB: export 3.80, openvino compile 3.39 and verify
3.69, record 4.19.
"""

from __future__ import annotations

GIB = 1 << 30

Figures = tuple[float, float]

EXPORT: Figures = (1.0, 0.75)
COMPILE: Figures = (1.2, 0.6)
RECORD: Figures = (1.1, 0.9)


def needed(figures: Figures, size: int) -> int:
    return int(figures[0] * size + figures[1] * GIB)
