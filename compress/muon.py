"""Muon: matrices move by their gradients' running mean with singular values made about equal.

``torch.optim.Muon`` computes it in bfloat16 everywhere. On processors that are not made for that it
took most of a step, and its rounding sets several processes apart from one. Here float32 is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # ax + bx³ + cx⁵, five times, brings 0.01 to 1 to about 1


class Muon(torch.optim.Optimizer):
    """Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with Nesterov's momentum.

    Steps are of the size of AdamW's, so that both take one learning rate (arXiv 2502.16982).
    ``parameters`` are matrices, or groups of them.
    """

    def __init__(
        self, parameters: Any, *, lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(parameters, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = evened(p.grad.lerp(mean, momentum))
                p.mul_(1 - rate * group["weight_decay"])
                p.add_(update.to(p.dtype), alpha=-rate * 0.2 * max(p.shape) ** 0.5)


def evened(matrix: Tensor) -> Tensor:
    """UVᵀ of a matrix USVᵀ, about: singular values of 0.7 to 1.2 (Newton–Schulz)."""
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.T if tall else x
