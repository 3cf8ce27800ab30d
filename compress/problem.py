"""The layer problem that every method solves, and the one measure of how well it did."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compress.moments import Moments
from compress.weights import Dense, Weight


@dataclass(frozen=True)
class Table:
    """What the loss says of a table whose rows are looked up, or make logits, or both.

    lookups   float32 [out], how often each row is looked up, a token; None if none is
    found     float32 [in, in], second moments of the loss's gradient at what is looked up
    logits    float32 [out], mean squares of the gradient at a head's outputs; None if it is none
    """

    lookups: Tensor | None = None
    found: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class LayerProblem:
    """Find Ŵ near W in what the layer puts out, for few bytes.

    name     the site's module
    weight   what is stored now; W is its dense matrix, float32 [out, in]
    moments  of the inputs X̂ that the layer reads in the partly compressed model; None without
             data, which means H = I
    goal     float32 [out, in], what Ŵ should be near instead of W: W corrected for the error that
             X̂ carries from the layers before (see ``Moments.corrected``)
    gradients  second moments [out, out] of the loss's gradient at the outputs, if measured: an
             error D of the weight then costs about tr(F D H Dᵀ) of loss
    table    the same of an embedding or a head
    """

    name: str
    weight: Weight
    moments: Moments | None = None
    goal: Tensor | None = None
    gradients: Moments | None = None
    table: Table | None = None

    @classmethod
    def of(cls, matrix: Tensor, H: Tensor | None = None, name: str = "matrix") -> LayerProblem:
        """A problem made from a plain matrix [out, in] and a second moment [in, in]."""
        return cls(name, Dense.of(matrix), None if H is None else Moments(H))

    @property
    def W(self) -> Tensor:
        return self.weight.dense()

    @property
    def target(self) -> Tensor:
        """float32 [out, in] that Ŵ approximates; W itself unless errors are corrected."""
        return self.W if self.goal is None else self.goal

    @property
    def H(self) -> Tensor | None:
        """float32 [in, in]: X̂ᵀX̂ / T, or None."""
        return None if self.moments is None else self.moments.H

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

    @cached_property
    def energy(self) -> float:
        """tr(T H Tᵀ), T = target."""
        return _energy(self.target, self.H)


def relative_error(problem: LayerProblem, solution: Weight) -> float:
    """tr((T − Ŵ) H (T − Ŵ)ᵀ) / tr(T H Tᵀ), T = target: the share of the output that is wrong.

    0 is exact, 1 is as bad as a zero weight. Without H it is ‖W − Ŵ‖² / ‖W‖².
    """
    wrong = _energy(problem.target - solution.dense(), problem.H)
    whole = problem.energy
    if whole == 0:
        return 0.0 if wrong == 0 else float("inf")
    return wrong / whole


def _energy(W: Tensor, H: Tensor | None) -> float:
    through = W if H is None else W @ H
    return (through * W).sum(dtype=torch.float64).item()
