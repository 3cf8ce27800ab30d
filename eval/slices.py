"""Two checkpoints compared slice by slice: which part of the data pays most for the compression.

Many slices are looked at and the worst is named, so every interval here is wider than 95%: all of
them together hold with 95% (Bonferroni: each with 1 − 0.05/k for k slices).

The *excess* of a slice is how much its difference is above the mean over all data. Both share
examples; the standard error is that of the linearized residuals

    e_i = (d_i(s) − mean(s) · w_i(s)) / W(s)  −  (d_i − mean · w_i) / W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.errors import DataError
from eval.compare import (
    Difference,
    by_document,
    check_same,
    difference,
    is_higher_better,
    spread,
    t_quantile,
)
from eval.results import Part, Result


@dataclass(frozen=True)
class Slice:
    """One label of one column of the data, and what the compression did there."""

    column: str
    label: str
    share: float
    """Of all predictions."""
    difference: Difference
    excess: float
    """Difference here minus the mean difference, in the metric's unit."""
    low: float
    """Lower end of the excess's interval."""
    high: float

    @property
    def name(self) -> str:
        return f"{self.column} {self.label}"


def slices(a: Result, b: Result) -> list[Slice]:
    """a - b on every slice that both results have.

    Raises:
        DataError: the two were not measured example by example on the same data.
    """
    check_same(a, b)
    columns = [column for column in a.slices if column in b.slices]
    pairs = [
        (column, label, part, b.slices[column][label])
        for column in columns
        for label, part in a.slices[column].items()
        if len(part.examples) > 1 and label in b.slices[column]
    ]
    level = 1 - 0.05 / max(len(pairs), 1)
    found = []
    for column, label, ours, theirs in pairs:
        if (ours.examples, ours.counts) != (theirs.examples, theirs.counts):
            raise DataError(f"{a.checkpoint} and {b.checkpoint}: {column} {label} differs")
        found.append(_slice(a, b, column, label, level))
    return found


def worst(found: Sequence[Slice], higher_is_better: bool) -> Slice | None:
    """The slice that loses most, among those that lose measurably more than the mean; None where
    no slice does."""
    sign = -1 if higher_is_better else 1
    above = [s for s in found if min(sign * s.low, sign * s.high) > 0]
    return max(above, key=lambda s: sign * s.difference.mean, default=None)


def _slice(a: Result, b: Result, column: str, label: str, level: float) -> Slice:
    own = _subtract(a.slices[column][label], b.slices[column][label])
    total: dict[int, tuple[float, float]] = {}
    for name, part in a.slices[column].items():
        for example, (d, w) in _subtract(part, b.slices[column][name]).items():
            before = total.get(example, (0.0, 0.0))
            total[example] = (before[0] + d, before[1] + w)
    here, weight = _mean(own)
    everywhere, all_weight = _mean(total)
    residuals = []
    for example, (d, w) in total.items():
        ours = own.get(example, (0.0, 0.0))
        residuals.append((ours[0] - here * ours[1]) / weight - (d - everywhere * w) / all_weight)
    units = by_document(residuals, [a.documents[e] for e in total] if a.documents else ())
    reach = t_quantile((1 + level) / 2, len(units) - 1) * spread(units)
    excess = here - everywhere
    found = difference(
        a.metric,
        [d for d, _ in own.values()],
        [w for _, w in own.values()],
        [a.documents[example] for example in own] if a.documents else (),
        higher_is_better=is_higher_better(a),
        level=level,
    )
    return Slice(column, label, weight / all_weight, found, excess, excess - reach, excess + reach)


def _subtract(a: Part, b: Part) -> dict[int, tuple[float, float]]:
    """Example → (difference of sums, predictions)."""
    return {
        example: (x - y, w)
        for example, x, y, w in zip(a.examples, a.sums, b.sums, a.counts, strict=True)
    }


def _mean(pairs: dict[int, tuple[float, float]]) -> tuple[float, float]:
    weight = math.fsum(w for _, w in pairs.values())
    return math.fsum(d for d, _ in pairs.values()) / weight, weight
