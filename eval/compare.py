"""Paired differences: is checkpoint a really better than checkpoint b, or is it the text?

Some windows of text are easier than others, and they are easier for both checkpoints. Subtracting
window by window removes that shared part, so the standard error of the difference is far smaller
than the standard error of either mean, and small losses become visible.

    d_i = a_i - b_i        mean = Σ d_i / n        stderr = sqrt( Σ (d_i - mean)² / (n - 1) / n )

The 95% interval is mean ± t(n - 1) · stderr. Windows are treated as independent; cut from one long
document they are slightly correlated, and the interval is then a little too narrow.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from compress.errors import DataError
from eval.results import Result

HIGHER_IS_BETTER = frozenset(
    {"top1_agreement", "generation", "prefill_tokens_per_s", "decode_tokens_per_s"}
)
OWN = {"weights", "original"}  # what two setups may differ in: the checkpoints themselves

BETTER, WORSE, SAME = "better", "worse", "no measurable difference"


@dataclass(frozen=True)
class Difference:
    """a - b of one metric over the same windows, in the metric's own unit."""

    metric: str
    mean: float
    stderr: float
    low: float
    """Lower end of the 95% interval of the mean."""
    high: float
    """Upper end of the 95% interval of the mean."""
    windows: int
    verdict: str
    """What a is, next to b: "better", "worse" or "no measurable difference"."""


def paired(a: Result, b: Result, *, higher_is_better: bool | None = None) -> Difference:
    """The paired difference a - b of the per-window ``samples`` of two results.

    ``higher_is_better`` is known for the built-in metrics and taken to be false for others.

    Raises:
        DataError: the two were not measured window by window on the same text.
    """
    _check_same_windows(a, b)
    differences = [x - y for x, y in zip(a.samples, b.samples, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    stderr = statistics.stdev(differences) / math.sqrt(count)
    reach = t_quantile_975(count - 1) * stderr
    if higher_is_better is None:
        higher_is_better = a.metric in HIGHER_IS_BETTER
    verdict = SAME
    if abs(mean) > reach:
        verdict = BETTER if (mean > 0) == higher_is_better else WORSE
    return Difference(a.metric, mean, stderr, mean - reach, mean + reach, count, verdict)


def t_quantile_975(degrees: int) -> float:
    """Student's t at probability 0.975; the normal's 1.96 for many degrees of freedom.

    The expansion in 1/degrees is Abramowitz & Stegun 26.7.5, here within 0.1% from four degrees
    on; the three values below that are from its table 26.10.
    """
    if degrees <= 3:
        return {1: 12.706, 2: 4.303, 3: 3.182}[degrees]
    z = statistics.NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * degrees**4)
    )


def _check_same_windows(a: Result, b: Result) -> None:
    pair = f"{a.checkpoint} and {b.checkpoint}"
    again = "run `compress eval` on both with the same --data"
    if a.metric != b.metric:
        raise DataError(f"{pair}: {a.metric} cannot be compared with {b.metric}")
    if "hash" not in a.data or a.data["hash"] != b.data.get("hash"):
        raise DataError(f"{pair}: {a.metric} was measured on different text; {again}")
    if _shared(a) != _shared(b):
        raise DataError(f"{pair}: {a.metric} was measured with different settings; {again}")
    if len(a.samples) != len(b.samples):
        raise DataError(
            f"{pair}: {a.metric} has {len(a.samples)} and {len(b.samples)} windows; {again}"
        )
    if len(a.samples) < 2:
        raise DataError(f"{pair}: {a.metric} has fewer than two windows; {again}")
    if not all(map(math.isfinite, [*a.samples, *b.samples])):
        raise DataError(f"{pair}: {a.metric} is not a finite number in every window")


def _shared(result: Result) -> dict[str, object]:
    return {key: value for key, value in result.setup.items() if key not in OWN}
