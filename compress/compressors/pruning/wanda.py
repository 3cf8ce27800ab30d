"""Pruning by weight times activation."""

from __future__ import annotations

from pydantic import Field

from compress.compressors.pruning.calibrated import CalibratedPruner
from compress.compressors.pruning.masks import keep_share
from compress.problem import LayerProblem
from compress.weights import Sparse


class Wanda(CalibratedPruner):
    """Set the weights with the smallest |w_ij|·√H_jj of each row to zero (arXiv 2306.11695).

    The rest stays as it is. ``admm`` takes about as little memory, and is better.
    """

    propagate: float = Field(0.0, ge=0, le=1, description="0: as published, weights do not change")

    def solve(self, problem: LayerProblem) -> Sparse:
        T = problem.target
        score = T.abs() * problem.H_diag.sqrt()
        keep = self.keep(score) if self.pattern else keep_share(score, self.share, "row")
        return Sparse.of(T, keep, problem.dtype)
