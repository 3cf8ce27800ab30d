"""Bits chosen for each matrix, so that all together come to an average."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from compress.compressors.budget import allocate
from compress.problem import LayerProblem
from compress.weights import Weight

WIDTHS = (2, 3, 4, 5, 6, 8)  # bits that a matrix may get

Trial = Callable[[LayerProblem, int], Weight]  # the weight of a problem in so many bits
Size = Callable[[tuple[int, int], torch.dtype, float], int]  # bytes of [out, in] in so many bits


def share_out(
    problems: Iterable[LayerProblem], average: float, trial: Trial, size: Size
) -> dict[str, int]:
    """Bits of every site, of least Σ cost for the bytes that ``average`` bits would take.

    The cost of a site is what rounding it does to the loss: see ``cost``. Σ is over errors of
    weights that were really rounded, one trial for each of ``WIDTHS``.
    """
    names, options, budget = [], [], 0
    for problem in problems:
        shape = problem.weight.shape
        costs = torch.tensor([cost(problem, trial(problem, b)) for b in WIDTHS]).double()
        names.append(problem.name)
        options.append((
            torch.tensor([size(shape, problem.dtype, b) for b in WIDTHS]),
            costs.cummin(0).values,
        ))  # fmt: skip
        budget += size(shape, problem.dtype, average)
    chosen = allocate(options, budget)
    return {name: WIDTHS[c] for name, c in zip(names, chosen, strict=True)}


def cost(problem: LayerProblem, weight: Weight) -> float:
    """½ tr(F D H Dᵀ), D = Ŵ − T: about the KL to the model before (K-FAC, arXiv 1503.05671).

    F is the second moment of the loss's gradient at the outputs. Where it was not measured, the
    error tr(D H Dᵀ) over the root of the output's energy, as for shares of a sparsity.
    """
    D = weight.dense() - problem.target
    through = D if problem.H is None else D @ problem.H
    if problem.gradients is not None:
        return 0.5 * ((problem.gradients.H @ D) * through).sum(dtype=torch.float64).item()
    return (through * D).sum(dtype=torch.float64).item() / max(problem.energy, 1e-30) ** 0.5
