"""Truncated singular value decomposition."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.compressors.base import LayerCompressor, Shape
from compress.problem import LayerProblem
from compress.weights import Dense, LowRank, Weight


class SVD(LayerCompressor):
    """Keep the ``rank`` largest singular values: Ŵ = U_r Σ_r V_rᵀ (Eckart–Young 1936).

    The best Ŵ of that rank in ‖W − Ŵ‖², which is Σ_{i>r} σ_i². Stored as two factors
    A = U_r Σ_r^½ [out, r] and B = Σ_r^½ V_rᵀ [r, in], r·(out + in) numbers; a matrix that would
    grow stays dense.
    """

    family: ClassVar = "low-rank"
    accepts: ClassVar = frozenset({"dense", "sparse"})
    makes: ClassVar = "lowrank"

    rank: int | None = Field(None, ge=1, description="rank of every matrix")
    ratio: float | None = Field(None, gt=0, le=1, description="share of parameters kept")
    energy: float | None = Field(
        None, gt=0, lt=1, description="share of Σσ² kept, matrix by matrix"
    )

    @model_validator(mode="after")
    def _one_of_three(self) -> SVD:
        given = [n for n in ("rank", "ratio", "energy") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of rank, ratio and energy, not {' and '.join(given)}")
        return self

    def solve(self, problem: LayerProblem) -> Weight:
        W = problem.W
        sigma, U = left_singular(W)
        rank = self._rank(problem.weight.shape, sigma)
        if rank is None:
            return Dense.of(W, problem.dtype)
        root = sigma[:rank].clamp(min=sigma[0] * 1e-12).sqrt().clamp(min=1e-30)
        A = U[:, :rank] * root
        B = (U[:, :rank] / root).T @ W.double()
        return LowRank.of(A.float(), B.float(), problem.dtype)

    def _rank(self, shape: Shape, sigma: Tensor | None) -> int | None:
        """The rank for a matrix of this shape, or None where factors would not be smaller."""
        rows, columns = shape
        if self.energy is not None and sigma is not None:
            share = sigma.square().cumsum(0) / sigma.square().sum().clamp(min=1e-300)
            rank = int((share < self.energy).sum()) + 1
        elif self.rank is not None:
            rank = self.rank
        else:  # half the parameters when nothing is said
            ratio = self.ratio if self.ratio is not None else 0.5 if self.energy is None else 1.0
            rank = max(1, int(ratio * rows * columns / (rows + columns)))
        return rank if rank * (rows + columns) < rows * columns else None

    def pieces(self, shape: Shape) -> list[Shape]:
        rank = self._rank(shape, None)
        return [shape] if rank is None else [(shape[0], rank), (rank, shape[1])]

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        return sum(rows * columns for rows, columns in self.pieces(shape)) * dtype.itemsize


def left_singular(W: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values [k], largest first, and left vectors [out, k], in float64; k = min(shape).

    Through the eigenvectors of the smaller Gram matrix, several times faster than an SVD; in
    float64 what this loses lies far below the 16 bits that factors are stored in.
    """
    W = W.double()
    if W.shape[0] <= W.shape[1]:
        values, U = torch.linalg.eigh(W @ W.T)
        return values.flip(0).clamp(min=0).sqrt(), U.flip(1)
    values, V = torch.linalg.eigh(W.T @ W)
    sigma, V = values.flip(0).clamp(min=0).sqrt(), V.flip(1)
    return sigma, (W @ V) / sigma.clamp(min=sigma[0] * 1e-12).clamp(min=1e-300)
