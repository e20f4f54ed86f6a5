"""Muon for matrices and convolutions, AdamW for the rest, as one optimiser.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of each
matrix by its nearest orthogonal matrix, found by five Newton-Schulz steps. On networks this small
and budgets this short it takes fewer steps than AdamW to the same loss.
"""

from __future__ import annotations

from collections import defaultdict

import torch


def _orthogonal(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Approximately U V^T of each matrix of a batch (N, rows, columns)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """`matrices` by Muon at rate `lr`; `others` by AdamW at `lr * other_scale`."""

    def __init__(self, matrices, others, lr, other_scale=0.1, momentum=0.95, weight_decay=0.01):
        groups = [
            {"params": list(matrices), "muon": True, "scale": 1.0, "weight_decay": weight_decay},
            {"params": list(others), "muon": False, "scale": other_scale, "weight_decay": 0.0},
        ]
        self.momentum = momentum
        super().__init__([group for group in groups if group["params"]], {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            rate = group["lr"] * group["scale"]
            if group["muon"]:
                self._step_matrices(group, rate)
            else:
                self._step_others(group, rate)

    def _step_matrices(self, group, rate):
        alike = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is not None:
                alike[(weight.shape[0], weight[0].numel())].append(weight)
        for (rows, columns), weights in alike.items():
            momenta = []
            for weight in weights:
                grad = weight.grad.reshape(rows, columns)
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(grad)
                state["momentum"].lerp_(grad, 1 - self.momentum)
                momenta.append(grad.lerp(state["momentum"], self.momentum))
            # Matching the root mean square of an AdamW update lets one learning rate fit all shapes.
            updates = _orthogonal(torch.stack(momenta)) * (0.2 * max(rows, columns) ** 0.5)
            for weight, update in zip(weights, updates, strict=True):
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(update.reshape(weight.shape), alpha=-rate)

    def _step_others(self, group, rate, betas=(0.9, 0.98), eps=1e-8):
        weights = [weight for weight in group["params"] if weight.grad is not None]
        for weight in weights:
            state = self.state[weight]
            if not state:
                state.update(age=0, mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
            state["age"] += 1
            state["mean"].lerp_(weight.grad, 1 - betas[0])
            state["square"].lerp_(weight.grad.square(), 1 - betas[1])
            mean = state["mean"] / (1 - betas[0] ** state["age"])
            square = state["square"] / (1 - betas[1] ** state["age"])
            weight.addcdiv_(mean, square.sqrt().add_(eps), value=-rate)


def muon(modules, lr, other_scale=1.0, **options) -> Muon:
    """Muon over modules: hidden matrices by Muon; vectors, embeddings, first and last layers by AdamW."""
    matrices, others = [], []
    for module in modules:
        for name, weight in module.named_parameters():
            if not weight.requires_grad:
                continue
            outer = weight.ndim < 2 or "embedding.weight" in name or min(weight.shape[:2]) <= 8
            (others if outer else matrices).append(weight)
    return Muon(matrices, others, lr, other_scale, **options)
