"""How much memory the kinds of steps need: (times the component's fp32 bytes, plus GiB), peak resident.

Measured on SD 1.5 at 512x512, whose UNet is 3.2 GiB: export 3.80, openvino compile 3.39 and verify
3.69, tensorrt_rtx compile 5.44, record 4.19. Compilations differ by backend: `Backend.memory`.
"""

from __future__ import annotations

GIB = 1 << 30

Figures = tuple[float, float]

EXPORT: Figures = (1.0, 0.75)
RECORD: Figures = (1.1, 0.9)
STAND_IN: Figures = (1.7, 0.6)
"""Verifying by its ONNX what cannot run: 6.0 GiB, the fp32 graph on both rows of a guided call."""


def needed(figures: Figures, size: int) -> int:
    return int(figures[0] * size + figures[1] * GIB)
