"""From costs to KL: a straight line through a few measured plans, in logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, 97.5%, by degrees of freedom
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


@dataclass(frozen=True)
class Law:
    """ln KL = level + slope · (ln cost − middle), and how far measured plans lie from it.

    The slope is free because errors that are large neither add up nor stay quadratic, and the
    level because a trial is rounded without making up for the errors before it.
    """

    level: float
    slope: float
    middle: float
    spread: float  # residual standard deviation
    width: float  # Σ (ln cost − middle)²
    count: int

    @classmethod
    def of(cls, costs: Sequence[float], measured: Sequence[float]) -> Law:
        """Least squares through three points or more.

        Raises:
            ValueError: fewer.
        """
        if len(costs) < 3:
            raise ValueError(f"a line with an interval needs three points, not {len(costs)}")
        x = [math.log(max(c, 1e-30)) for c in costs]
        y = [math.log(max(m, 1e-30)) for m in measured]
        n, middle, level = len(x), sum(x) / len(x), sum(y) / len(y)
        width = sum((a - middle) ** 2 for a in x)
        slope = sum((a - middle) * b for a, b in zip(x, y, strict=True)) / width
        wrong = sum((b - level - slope * (a - middle)) ** 2 for a, b in zip(x, y, strict=True))
        return cls(level, slope, middle, math.sqrt(wrong / (n - 2)), width, n)

    def predict(self, cost: float) -> tuple[float, float, float]:
        """KL in nats a token: expected, and the ends of the interval for 95% of new plans."""
        away = math.log(max(cost, 1e-30)) - self.middle
        expected = self.level + self.slope * away
        t = STUDENT[self.count - 3] if self.count - 3 < len(STUDENT) else 2.0
        half = t * self.spread * math.sqrt(1 + 1 / self.count + away**2 / self.width)
        return math.exp(expected), math.exp(expected - half), math.exp(expected + half)
