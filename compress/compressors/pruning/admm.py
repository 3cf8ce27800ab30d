"""Pruning as the optimization problem it is: mask and weights found together."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compress.compressors.pruning.calibrated import ALLOCATION, Allocation, CalibratedPruner
from compress.moments import Moments
from compress.problem import LayerProblem
from compress.weights import Sparse

START, MOST = 0.1, 600  # first penalty; most iterations
EVERY = 3  # iterations between two looks at the mask


class ADMM(CalibratedPruner):
    """min tr((T − Ŵ) H (T − Ŵ)ᵀ) with zeros, by alternating directions (ALPS, arXiv 2406.07831).

    With inputs scaled so that H has a unit diagonal, a dense B and a sparse D are drawn together:
    B = (T H − V + ρD)(H + ρI)⁻¹, D = the largest entries of B + V/ρ, V += ρ(B − D), while ρ
    grows, half as fast as published, for as long as the mask still changes. Conjugate gradients
    then find the best weights for the mask. Matrices whose outputs suffer less lose more, unless
    a pattern fixes what each loses.
    """

    allocation: Allocation = Field("error", description=ALLOCATION)
    updates: int = Field(
        20, ge=0, description="conjugate-gradient steps for the weights of the final mask"
    )

    def solve(self, problem: LayerProblem) -> Sparse:
        T = problem.target
        moments = problem.moments or Moments(torch.eye(T.shape[1]))
        scale = moments.damped.diagonal().float().sqrt()
        H = moments.damped.float() / torch.outer(scale, scale)
        values, Q = moments.unit_eigh
        goal = (T * scale) @ H
        D = self._alternate(T * scale, goal, values, Q)
        keep = D != 0
        D = conjugate_gradients(D, keep, H, goal, self.updates)
        return Sparse.of(D / scale, keep, problem.dtype)

    def _alternate(self, D: Tensor, goal: Tensor, values: Tensor, Q: Tensor) -> Tensor:
        """The sparse matrix [out, in] that the iterations end with, in scaled inputs."""
        kept = self.keep(D.abs())
        size = int(kept.sum())
        D, V, rho = D * kept, torch.zeros_like(D), START
        before = kept
        for step in range(1, MOST + 1):
            B = (((goal - V + rho * D) @ Q) / (values + rho)) @ Q.T
            moved = B + V / rho
            kept = self.keep(moved.abs())
            D = moved * kept
            V += rho * (B - D)
            if step % EVERY:
                continue
            change = int((kept != before).sum()) / (2 * size)
            before = kept
            if change == 0 or (step > 30 and change < 0.0003):
                break
            rho *= 1.15 if change > 0.1 else 1.1 if change > 0.005 else 1.05
        return D


def conjugate_gradients(D: Tensor, keep: Tensor, H: Tensor, goal: Tensor, steps: int) -> Tensor:
    """min tr(D H Dᵀ) − 2 tr(D goalᵀ) over D [out, in] that is zero outside ``keep``, from D on.

    Each row is a system of its own; all go together.
    """
    residual = (goal - D @ H) * keep
    direction = residual.clone()
    energy = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        ahead = (direction @ H) * keep
        curvature = (direction * ahead).sum(1, keepdim=True)
        length = energy / curvature.clamp(min=1e-30)
        D = D + length * direction
        residual = residual - length * ahead
        fresh = residual.square().sum(1, keepdim=True)
        direction = residual + fresh / energy.clamp(min=1e-30) * direction
        energy = fresh
    return D
