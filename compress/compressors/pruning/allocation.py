"""How many weights each matrix loses, of a share that holds for all of them together."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from compress.compressors.budget import allocate
from compress.problem import LayerProblem

SHARES = torch.arange(96) / 100  # of a matrix, that may go
OUTLIER, REACH = 5.0, 0.08  # times the mean; how far a share may be from the common one (OWL)


def by_error(problems: Iterable[LayerProblem], sparsity: float) -> dict[str, float]:
    """Shares of least Σ error / √energy, by what Σ w²·H_jj of the pruned weights comes to.

    Error over the root of the output's energy stands between the error itself, which saves the
    largest outputs alone, and the relative error, to which all are the same.
    """
    names, options, whole = [], [], 0
    for problem in problems:
        score = (problem.target.square() * problem.H_diag).flatten().sort().values.double()
        pruned = torch.cat([torch.zeros(1, dtype=torch.float64), score.cumsum(0)])
        drop = (SHARES.double() * len(score)).round().long()
        error = pruned[drop] / pruned[-1].clamp(min=1e-300).sqrt()
        names.append(problem.name)
        options.append(((len(score) - drop).flip(0), error.flip(0)))
        whole += len(score)
    chosen = allocate(options, round((1 - sparsity) * whole))
    return {n: float(SHARES.flip(0)[c]) for n, c in zip(names, chosen, strict=True)}


def by_outliers(problems: Iterable[LayerProblem], sparsity: float) -> dict[str, float]:
    """OWL (arXiv 2310.05175): fewer go where more of |w|·√H_jj are far above the mean.

    Shares lie within ``REACH`` of ``sparsity`` and keep it on average over all weights.
    """
    names, found, sizes = [], [], []
    for problem in problems:
        score = problem.target.abs() * problem.H_diag.sqrt()
        names.append(problem.name)
        found.append(float((score > OUTLIER * score.mean()).float().mean()))
        sizes.append(score.numel())
    ratios, weights = torch.tensor(found).double(), torch.tensor(sizes).double()
    span = float(ratios.max() - ratios.min())
    lift = torch.zeros_like(ratios) if span == 0 else 2 * REACH * (ratios - ratios.min()) / span
    shares: Tensor = sparsity - lift + (lift * weights).sum() / weights.sum()
    return dict(zip(names, shares.clamp(0, 0.99).tolist(), strict=True))
