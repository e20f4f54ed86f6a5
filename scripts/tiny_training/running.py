"""What every stage of training needs: a clock that ends it, averaged weights, whole checkpoints."""

from __future__ import annotations

import copy
import math
import sys
import time
from pathlib import Path

import torch


class Clock:
    """Time left of a stage, which the learning rate follows. Survives a resume through `spent_s`."""

    def __init__(self, name: str, minutes: float, spent_s: float = 0.0, every_s: float = 20.0):
        self.name, self.total_s, self.every_s = name, minutes * 60, every_s
        self._start = time.monotonic() - spent_s
        self._said = -math.inf

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self._start

    @property
    def done(self) -> float:
        """The share of the time that is gone, 0 to 1."""
        return min(self.spent_s / self.total_s, 1.0)

    def rate(self, peak: float, step: int, warm_up: int = 100) -> float:
        """Learning rate: linear warm-up in steps, then flat, then linear to zero over the last half."""
        return peak * min(1.0, (step + 1) / warm_up) * min(1.0, 2 * (1 - self.done) + 1e-3)

    def due(self) -> bool:
        """Whether a line of progress is due."""
        if self.spent_s - self._said < self.every_s:
            return False
        self._said = self.spent_s
        return True

    def say(self, text: str) -> None:
        left = max(self.total_s - self.spent_s, 0)
        sys.stdout.write(f"{self.name} {self.spent_s:6.0f} s, {left / 60:5.1f} min left: {text}\n")
        sys.stdout.flush()


class Average:
    """An exponential moving average of a module's weights, which is what is shipped."""

    def __init__(self, module: torch.nn.Module, decay: float):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.age = decay, 0

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        self.age += 1
        # Young averages forget faster, or the random start would stay in them for long.
        decay = min(self.decay, (1 + self.age) / (10 + self.age))
        averaged, weights = list(self.module.parameters()), list(module.parameters())
        torch._foreach_lerp_(averaged, [weight.detach() for weight in weights], 1 - decay)


def save(path: Path, state: dict) -> None:
    """Write a checkpoint whole or not at all, so that Ctrl-C cannot leave half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load(path: Path) -> dict | None:
    """A checkpoint, or None if there is none."""
    return torch.load(path, weights_only=False) if path.exists() else None
