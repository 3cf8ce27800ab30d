"""The layer problem that every method solves, and the one measure of how well it did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.weights import Dense, Weight


@dataclass(frozen=True)
class LayerProblem:
    """Find Ŵ near W in what the layer puts out, for few bytes.

    name    the site's module
    weight  what is stored now; W is its dense matrix, float32 [out, in]
    H       float32 [in, in], second moment of the inputs, X̂ᵀX̂ / T; None means the identity
    """

    name: str
    weight: Weight
    H: Tensor | None = None

    @classmethod
    def of(cls, matrix: Tensor, H: Tensor | None = None, name: str = "matrix") -> LayerProblem:
        """A problem made from a plain matrix [out, in]."""
        return cls(name, Dense.of(matrix), H)

    @property
    def W(self) -> Tensor:
        return self.weight.dense()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model holds this weight."""
        return self.weight.dtype

    @property
    def H_diag(self) -> Tensor:
        """float32 [in]: mean square of each input; ones without data."""
        if self.H is None:
            return torch.ones(self.weight.shape[1])
        return self.H.diagonal()


def relative_error(problem: LayerProblem, solution: Weight) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ): the share of the output's energy that is wrong.

    0 is exact, 1 is as bad as a zero weight. Without H it is ‖W − Ŵ‖² / ‖W‖².
    """
    W = problem.W
    change = W - solution.dense()
    wrong, whole = _energy(change, problem.H), _energy(W, problem.H)
    if whole == 0:
        return 0.0 if wrong == 0 else float("inf")
    return wrong / whole


def _energy(W: Tensor, H: Tensor | None) -> float:
    through = W if H is None else W @ H
    return (through * W).sum(dtype=torch.float64).item()
