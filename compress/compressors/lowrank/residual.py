"""What a packed weight lost, given back by two thin factors beside it."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator

from compress.compressors.base import Shape
from compress.compressors.lowrank.truncation import Truncation, projections
from compress.problem import LayerProblem
from compress.weights import LowRank, Sum


class Residual(Truncation):
    """Add the best rank-r correction to a packed weight Q: Ŵ = Q + A·B (QERA, arXiv 2410.06040).

    A·B is the truncation of T − Q in the metric of the layer's outputs (EoRA, arXiv 2410.21271);
    T is the problem's target, the original model's matrix. A problem without one has nothing to
    give back, and A·B is zero. In a checkpoint it is a PEFT adapter beside the packed weights.
    """

    accepts: ClassVar = frozenset({"quantized", "int8", "nf4", "sparse"})
    makes: ClassVar = "sum"
    layouts: ClassVar = frozenset({"linear", "conv1d"})
    packs: ClassVar = False
    restores: ClassVar = True
    needs_text: ClassVar = False

    rank: int | None = Field(None, ge=1, description="rank of every correction; 16 if unsaid")
    ratio: float | None = Field(
        None, gt=0, le=1, description="numbers of a correction, as a share of its matrix's"
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Residual:
        if self.rank is not None and self.ratio is not None:
            raise ValueError("give one of rank and ratio")
        return self

    def solve(self, problem: LayerProblem) -> Sum:
        T, H, F = self.sees(problem)
        lost = T.double() - problem.weight.dense().double()
        _, P, Q = projections(lost, H, F)
        rank = self.rank_of(problem.weight.shape)
        added = LowRank.balanced(P[:, :rank], Q[:, :rank].T @ lost, problem.dtype)
        return Sum.of(problem.weight, added)

    def rank_of(self, shape: Shape) -> int:
        """Of the correction of a matrix of this shape."""
        rows, columns = shape
        rank = 16 if self.rank is None else self.rank
        if self.ratio is not None:
            rank = int(self.ratio * rows * columns / (rows + columns))
        return max(1, min(rank, rows, columns))

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        rows, columns = shape
        return (rows * columns + self.rank_of(shape) * (rows + columns)) * dtype.itemsize
