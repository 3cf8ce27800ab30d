"""Bits chosen for each matrix, so that all together come to an average."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.compressors.budget import allocate
from compress.problem import LayerProblem
from compress.weights import Weight

WIDTHS = (2, 3, 4, 5, 6, 8)  # bits that a matrix may get
FLOOR = 0.05  # of the mean: what a row counts beyond what the text says of it

Trial = Callable[[LayerProblem, int], Weight]  # the weight of a problem in so many bits
Size = Callable[[tuple[int, int], torch.dtype, float], int]  # bytes of [out, in] in so many bits


@dataclass(frozen=True)
class Choice:
    """A matrix, and for each of ``WIDTHS`` its bytes (int64) and the ``cost`` of a trial."""

    name: str
    sizes: Tensor
    costs: Tensor

    @classmethod
    def of(cls, problem: LayerProblem, trial: Trial, size: Size) -> Choice:
        costs = torch.tensor([cost(problem, trial(problem, b)) for b in WIDTHS]).double()
        sizes = [size(problem.weight.shape, problem.dtype, b) for b in WIDTHS]
        return cls(problem.name, torch.tensor(sizes), costs.cummin(0).values)


def choose(choices: Sequence[Choice], budget: int) -> dict[str, int]:
    """Bits of every matrix, of least Σ cost within ``budget`` bytes; the least bits beyond it."""
    chosen = allocate([(c.sizes, c.costs) for c in choices], budget)
    return {c.name: WIDTHS[i] for c, i in zip(choices, chosen, strict=True)}


def share_out(
    problems: Iterable[LayerProblem], average: float, trial: Trial, size: Size
) -> dict[str, int]:
    """Bits of every site, of least Σ cost for the bytes that ``average`` bits would take."""
    choices, budget = [], 0
    for problem in problems:
        choices.append(Choice.of(problem, trial, size))
        budget += size(problem.weight.shape, problem.dtype, average)
    return choose(choices, budget)


def cost(problem: LayerProblem, weight: Weight) -> float:
    """½ tr(F D H Dᵀ), D = Ŵ − T: about the KL to the model before (K-FAC, arXiv 1503.05671).

    F is the second moment of the loss's gradient at the outputs: of a head its diagonal, and of
    rows that are looked up ½ Σ_v lookups_v · D_v F D_vᵀ, rows ``counted`` as for other text. Where
    nothing was measured, the error tr(D H Dᵀ) over the root of the output's energy, as for shares
    of a sparsity.
    """
    D = weight.dense() - problem.target
    through = D if problem.H is None else D @ problem.H
    table = problem.table
    if table is not None:
        rows = torch.zeros(len(D))
        if table.lookups is not None and table.found is not None:
            rows += counted(table.lookups) * ((D @ table.found) * D).sum(1)
        if table.logits is not None:
            rows += counted(table.logits) * (through * D).sum(1)
        return 0.5 * rows.sum(dtype=torch.float64).item()
    if problem.gradients is not None:
        return 0.5 * ((problem.gradients.H @ D) * through).sum(dtype=torch.float64).item()
    return (through * D).sum(dtype=torch.float64).item() / max(problem.energy, 1e-30) ** 0.5


def counted(rows: Tensor) -> Tensor:
    """How much each row counts, none nothing: other text holds tokens that this one does not."""
    return rows + FLOOR * rows.mean().clamp(min=1e-30)
