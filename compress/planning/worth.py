"""What the costs of matrices that are alike are worth, by regression on plans that were measured.

Costs are taken in the model as it is and one by one. Once everything is compressed, some kinds of
matrices cost more than that, others less, and by how much shows in a few plans that share the same
bytes out differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.anatomy import Site

DOUBT = 0.5  # standard deviation of ln worth before anything is measured
BEND = 0.3  # of the exponent of KL over the sum of costs, about 1
NOISE = 0.03  # standard deviation of ln KL about the regression
ROUNDS = 20  # of Gauss-Newton: it converges in about five


def kinds(sites: Sequence[Site]) -> list[int]:
    """The number of each site's kind: its role, in the first or the second half of the blocks."""
    middle = (1 + max((s.block for s in sites if s.block is not None), default=0)) / 2
    labels = [(s.role, s.block is not None and s.block >= middle) for s in sites]
    numbers = {label: n for n, label in enumerate(dict.fromkeys(labels))}
    return [numbers[label] for label in labels]


@dataclass(frozen=True)
class Worth:
    """ln KL ≈ level + exponent · ln Σ_k exp(x_k) · cost_k: what is known of x, normal.

    mean        float64 [kinds]
    root        float64 [kinds, kinds], a root of the covariance
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, costs: Tensor, measured: Tensor) -> Worth:
        """From the costs of plans by kind, float64 [plans, kinds], and their KL, [plans].

        The posterior's peak by Gauss-Newton, x_k ~ N(0, DOUBT²) before; none are zero.
        """
        costs, y = costs.clamp(min=1e-30).log(), measured.clamp(min=1e-30).log()
        kinds = costs.shape[1]
        known = torch.tensor([0.0, BEND**-2] + [DOUBT**-2] * kinds).double()  # precision before
        middle = costs.logsumexp(1).mean()
        away = torch.zeros(2 + kinds).double()  # level, exponent − 1, x
        for _ in range(ROUNDS):
            level, bend, x = away[0], 1 + away[1], away[2:]
            total = (costs + x).logsumexp(1) - middle
            slopes = torch.cat(
                [torch.ones_like(y)[:, None], total[:, None], bend * (costs + x).softmax(1)], 1
            )
            precision = slopes.T @ slopes / NOISE**2 + known.diag()
            wrong = slopes.T @ (y - level - bend * total) / NOISE**2 - known * away
            away = away + torch.linalg.solve(precision, wrong)
        covariance = torch.linalg.inv(precision)[2:, 2:]
        return cls(away[2:], torch.linalg.cholesky(covariance))

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Worths that are possible, float64 [kinds]."""
        normal = torch.randn(len(self.mean), generator=generator).double()
        return (self.mean + self.root @ normal).exp()
