"""Pruning that makes up for itself, input by input."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compress.compressors.pruning.calibrated import CalibratedPruner
from compress.compressors.pruning.masks import keep_n_of_m, keep_share
from compress.moments import Moments
from compress.problem import LayerProblem
from compress.weights import Sparse

BLOCK = 128  # inputs whose mask is chosen at once


class SparseGPT(CalibratedPruner):
    """Optimal brain surgery with a mask chosen as it goes (arXiv 2301.00774), as published.

    Inputs in their own order, 128 at a time: those weights go whose w² / [H⁻¹]_jj is smallest, H⁻¹
    being that of the inputs still to come, and each error moves these to make up. ``admm`` is
    better; this is what it is compared with.
    """

    propagate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how far to correct for the error of the layers before; published: not",
    )

    def solve(self, problem: LayerProblem) -> Sparse:
        T = problem.target
        moments = problem.moments or Moments(torch.eye(T.shape[1]))
        if self.pattern is not None:
            self.keep(T)  # refuses a width that the pattern does not divide
        W, keep = self._sweep(T, moments)
        return Sparse.of(W, keep, problem.dtype)

    def _sweep(self, T: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
        _, U = moments.inverse_factor(descending=False)
        W, keep = T.clone(), torch.ones_like(T, dtype=torch.bool)
        width = T.shape[1]
        size = BLOCK - BLOCK % self.n_of_m[1]
        for start in range(0, width, size):
            end = min(start + size, width)
            if self.pattern is None:
                score = W[:, start:end].square() / U.diagonal()[start:end].square()
                keep[:, start:end] = keep_share(score, self.share)
            errors = torch.zeros(len(W), end - start)
            for j in range(start, end):
                n, m = self.n_of_m
                if self.pattern is not None and (j - start) % m == 0:
                    score = W[:, j : j + m].square() / U.diagonal()[j : j + m].square()
                    keep[:, j : j + m] = keep_n_of_m(score, n, m)
                error = W[:, j].masked_fill(keep[:, j], 0) / U[j, j]
                W[:, j:end] -= error[:, None] * U[j, j:end]
                errors[:, j - start] = error
            W[:, end:] -= errors @ U[start:end, end:]
        return W, keep
