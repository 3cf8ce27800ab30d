"""Truncation in the metric of the loss: the mathematics that every low-rank method here shares."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.compressors.base import CalibratedCompressor
from compress.moments import Moments
from compress.problem import LayerProblem
from compress.weights import Weight


class Truncation(CalibratedCompressor):
    """Methods whose answer for a given rank is the optimum, so that no fallback is needed."""

    family: ClassVar = "low-rank"

    weighs_tokens: ClassVar = False  # the gradients weigh outputs

    loss_weighted: bool = Field(
        True,
        description="weigh outputs by how much the loss depends on them; needs the whole model in "
        "memory, and a backward pass through it",
    )
    metric: Literal["outputs", "weights"] = Field(
        "outputs",
        description="what is kept best: the layer's outputs on the calibration text, or the "
        "weights (Eckart–Young), which is all there is without data",
    )

    def data_free(self) -> Any:
        return self.model_copy(update={"metric": "weights"})

    def best(self, problem: LayerProblem) -> tuple[Weight, str]:
        return self.solve(problem), self.name

    def sees(self, problem: LayerProblem) -> tuple[Tensor, Moments | None, Moments | None]:
        """T float32 [out, in], moments of the inputs, and F: as far as ``metric`` looks at them."""
        if self.metric == "weights" or problem.moments is None:
            return problem.target, None, None
        F = problem.gradients if self.loss_weighted else None
        return problem.target, problem.moments, F


def projections(
    T: Tensor, H: Moments | None, F: Moments | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """For every rank r the best Ŵ, as a projection of T: Ŵ = P[:, :r] · Q[:, :r]ᵀ · T.

    Best in tr(F (T − Ŵ) H (T − Ŵ)ᵀ), which is Σ_{i>r} σ_i²; the identity stands for an H or F
    that is None. With F = L_F L_Fᵀ, H = L_H L_Hᵀ (damped) and L_Fᵀ T L_H = U Σ Vᵀ this is
    P = L_F⁻ᵀ U, Q = L_F U: no root of H is ever inverted. Without F it is the whitened truncation
    of SVD-LLM (arXiv 2403.07378); with T corrected for upstream error, of AA-SVD (2604.02119).

    Returns:
        σ [k] descending, P and Q [out, k], float64; k = min(out, in).
    """
    M = T.double()
    if H is not None:
        M = M.masked_fill(H.dead, 0) @ H.factor
    if F is None:
        sigma, U = left_singular(M)
        return sigma, U, U
    L = F.factor
    sigma, U = left_singular(L.T @ M)
    return sigma, torch.linalg.solve_triangular(L.T, U, upper=True), L @ U


def left_singular(M: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values [k], largest first, and left vectors [out, k], in float64; k = min(shape).

    Through the eigenvectors of the smaller Gram matrix, several times faster than an SVD; in
    float64 what this loses lies far below the 16 bits that factors are stored in.
    """
    M = M.double()
    if M.shape[0] <= M.shape[1]:
        values, U = torch.linalg.eigh(M @ M.T)
        return values.flip(0).clamp(min=0).sqrt(), U.flip(1)
    values, V = torch.linalg.eigh(M.T @ M)
    sigma, V = values.flip(0).clamp(min=0).sqrt(), V.flip(1)
    return sigma, (M @ V) / sigma.clamp(min=sigma[0] * 1e-12).clamp(min=1e-300)
