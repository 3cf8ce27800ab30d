"""From costs to KL: a curve through a few measured plans, in logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Student's t, 97.5%, by degrees of freedom
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


@dataclass(frozen=True)
class Law:
    """ln KL = Σ_k weight_k · (ln cost − middle)^k, and how far measured plans lie from it.

    The slope is free because errors that are large neither add up nor stay quadratic, and the
    level because a trial is rounded without making up for the errors before it. Through five points
    or more the curve may bend: at 8 bits the roundings of 16-bit scales count, too.
    """

    weights: NDArray[np.float64]
    covariance: NDArray[np.float64]  # of the weights, per unit of variance
    middle: float
    spread: float  # residual standard deviation
    count: int
    most: float  # the highest cost that was measured; errors beyond it are another matter

    @classmethod
    def of(cls, costs: Sequence[float], measured: Sequence[float]) -> Law:
        """Least squares through three points or more.

        Raises:
            ValueError: fewer.
        """
        count = len(costs)
        if count < 3:
            raise ValueError(f"a curve with an interval needs three points, not {count}")
        x, y = (np.log(np.maximum(np.array(v, dtype=float), 1e-30)) for v in (costs, measured))
        middle = float(x.mean())
        powers = np.vander(x - middle, 3 if count >= 5 else 2, increasing=True)
        covariance = np.linalg.pinv(powers.T @ powers)
        weights = covariance @ powers.T @ y
        wrong = float(((powers @ weights - y) ** 2).sum())
        return cls(
            weights,
            covariance,
            middle,
            math.sqrt(wrong / (count - len(weights))),
            count,
            max(costs),
        )

    def predict(self, cost: float) -> tuple[float, float, float]:
        """KL in nats a token: expected, and the ends of the interval for 95% of new plans."""
        away = math.log(max(cost, 1e-30)) - self.middle
        powers = away ** np.arange(len(self.weights))
        expected = float(powers @ self.weights)
        freedom = self.count - len(self.weights)
        t = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 2.0
        half = t * self.spread * math.sqrt(1 + float(powers @ self.covariance @ powers))
        return math.exp(expected), math.exp(expected - half), math.exp(expected + half)
