"""Entropy-coded rounding that makes up for itself, with steps by what the loss feels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from compress.compressors.base import PROPAGATE, CalibratedCompressor
from compress.compressors.quantization.bits import cost, counted
from compress.compressors.quantization.ecrtn import ECRTN, EntropyCoded
from compress.compressors.quantization.gptq import round_with_feedback
from compress.compressors.quantization.rates import Rate, share_out
from compress.compressors.quantization.steps import Steps, within
from compress.moments import Moments
from compress.problem import LayerProblem
from compress.weights import Coded, Weight

RATES = (-1.0, -0.25, 0.25, 0.75, 1.25, 2.0, 3.0, 4.5, 6.0)  # bits of a trial, about


class ECGPTQ(EntropyCoded, CalibratedCompressor):
    """Steps where the loss feels them least, GPTQ's feedback, and a Huffman code for the integers.

    An error D costs about ½ tr(F D H Dᵀ) of loss, F the second moment of its gradient at the
    outputs. Rounded in order with feedback (arXiv 2210.17323) weight (i, j) adds
    ½ F_ii Δ_ij² / (12 U_jj²), UᵀU = H⁻¹, and takes log₂(1/Δ_ij) bits; so for the bits in all it is
    best that all add alike: Δ_ij = s·U_jj / √F_ii (reverse water-filling, Cover and Thomas 10.3).
    ``prepare`` finds the one s of all matrices, tables included, for ``bits`` on average.
    """

    plans_tables: ClassVar = True

    propagate: float = Field(0.75, ge=0, le=1, description=PROPAGATE)

    _share: dict[str, float] = PrivateAttr(default_factory=dict)  # bits by site, from prepare

    @property
    def reads_gradients(self) -> bool:
        return True

    def data_free(self) -> ECRTN:
        return ECRTN(bits=self.bits)

    def prepare(self, problems: Callable[[], Iterable[LayerProblem]]) -> ECGPTQ:
        prepared = self.model_copy()
        rates = (Rate.of(p.name, in_steps(p)) for p in problems())
        prepared._share = share_out(rates, self.bits)
        return prepared

    def at_site(self, name: str) -> ECGPTQ:
        return self.model_copy(update={"bits": self._share[name]}) if name in self._share else self

    def informed(self, problem: LayerProblem) -> bool:
        return problem.moments is not None or problem.table is not None

    def wrong(self, problem: LayerProblem, weight: Weight) -> float:
        """The relative error does not say how much each row counts."""
        return cost(problem, weight)

    def solve(self, problem: LayerProblem) -> Coded:
        make, factor = self._maker(problem)
        predicted = self.predict(problem.weight.shape, problem.dtype)
        return within(make, factor * 2.0**-self.bits, predicted)

    def trials(self, problem: LayerProblem) -> list[tuple[float, float]]:
        """Bits a weight and ``cost`` of a few steps, rounded once each; bits ascending."""
        make, factor = self._maker(problem)
        tried = [make(factor * 2.0**-rate) for rate in RATES]
        return [(8 * t.nbytes / problem.weight.parameters, cost(problem, t)) for t in tried]

    def _maker(self, problem: LayerProblem) -> tuple[Callable[[float], Coded], float]:
        """What rounds with steps of a factor, and the factor that gives about no bits."""
        T, (rows, columns, moments) = problem.target, unit_steps(problem)

        def make(factor: float) -> Coded:
            steps = Steps.of(factor * rows, columns)
            return steps.coded(round_with_feedback(T, steps, moments), problem.dtype)

        return make, 4 * float((T / rows[:, None] / columns).square().mean().sqrt())


def unit_steps(problem: LayerProblem) -> tuple[Tensor, Tensor, Moments]:
    """Steps for s = 1, rows float32 [out] · columns float32 [in], and the moments of feedback.

    A column's is U_jj, what is left of an input's spread once those before it are known.
    """
    moments = metric(problem)
    order, U = moments.inverse_factor()
    return importance(problem).rsqrt(), U.diagonal()[order.argsort()], moments


def in_steps(problem: LayerProblem) -> Tensor:
    """float32 [out, in]: the weights that are wanted, in steps for s = 1."""
    rows, columns, _ = unit_steps(problem)
    return problem.target / rows[:, None] / columns


def importance(problem: LayerProblem) -> Tensor:
    """float32 [out]: F_ii, how much the loss feels an error of each output; positive."""
    table = problem.table
    if problem.gradients is not None:
        F = problem.gradients.H.diagonal()
    elif table is not None:
        F = torch.zeros(problem.weight.shape[0])
        if table.lookups is not None and table.found is not None:
            F = F + table.lookups * table.found.diagonal().mean()
        if table.logits is not None:
            F = F + table.logits * problem.H_diag.mean()
    else:
        F = torch.full((problem.weight.shape[0],), max(problem.energy, 1e-30) ** -0.5)
    return counted(F)


def metric(problem: LayerProblem) -> Moments:
    """What stands for H: of a table the mean of what its rows are to the loss, per unit of F."""
    table = problem.table
    if table is None or problem.gradients is not None:
        return problem.moments or Moments(torch.eye(problem.weight.shape[1]))
    H = torch.zeros(problem.weight.shape[1], problem.weight.shape[1])
    if table.lookups is not None and table.found is not None:
        H += table.lookups.mean() * table.found
    if table.logits is not None and problem.H is not None:
        H += table.logits.mean() * problem.H
    return Moments(H / H.diagonal().mean().clamp(min=1e-30))
