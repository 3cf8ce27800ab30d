"""Paired differences: is checkpoint a really better than checkpoint b, or is it the text?

Some examples are easier than others, and they are easier for both checkpoints. Subtracting example
by example removes that shared part, so the standard error of the difference is far smaller than
the standard error of either mean, and small losses become visible. With d_i the difference of the
sums over example i and w_i the predictions in it (1 for a whole example):

    mean = Σ d_i / Σ w_i        e_g = Σ_{i in g} (d_i − mean · w_i)
    stderr = √( G/(G−1) · Σ_g e_g² ) / Σ w_i

The units g are the documents that the examples are from: windows cut from one document resemble
each other, and to count them as independent makes the interval too narrow (Liang & Zeger,
Biometrika 73, 1986). Where no document is known, or just one, each example is a unit, and for
w = 1 this is the textbook formula. The interval is mean ± t(G−1) · stderr.

Differences of scores that are 0 or 1, each from a document of its own, have the interval of
Agresti & Min (Statistics in Medicine 24, 2005): half a pair is added to each of the four outcomes,
so that no interval has length zero and its coverage holds for few examples.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from compress.errors import DataError
from eval.results import Result

HIGHER_IS_BETTER = frozenset(
    {"top1_agreement", "generation", "prefill_tokens_per_s", "decode_tokens_per_s"}
)
OWN = {"weights", "original"}  # what two setups may differ in: the checkpoints themselves

BETTER, WORSE, SAME = "better", "worse", "no measurable difference"
LEVEL = 0.95
POWER = 0.8  # probability that a sample of the size called "needed" shows the difference
NOTHING = 1e-6  # of a standard error: a mean that is no more is rounding


@dataclass(frozen=True)
class Difference:
    """a - b of one metric over the same examples, in the metric's own unit."""

    metric: str
    mean: float
    stderr: float
    low: float
    """Lower end of the interval of the mean, 95% unless said otherwise."""
    high: float
    """Upper end of the interval of the mean."""
    windows: int
    """Examples that were compared."""
    verdict: str
    """What a is, next to b: "better", "worse" or "no measurable difference"."""
    documents: int = 0
    """Independent units that the examples come from."""
    needed: int | None = None
    """Where no difference is measurable: how many such examples would show one as large as the
    one seen, four times in five. None if it is measurable, or if they are equal on the whole."""
    changed: int = 0
    """Examples in which the two differ at all."""

    @property
    def words(self) -> str:
        """The verdict in a sentence."""
        where = f"over {self.windows:,} examples"
        if self.documents < self.windows:
            where += f" from {self.documents:,} documents"
        if self.verdict != SAME:
            return f"{self.verdict} {where}"
        if self.needed is None:
            how = "as much gained as lost" if self.changed else "equal in every one"
            return f"{SAME} {where}: {how}"
        return (
            f"{SAME} {where}; about {self.needed:,} would settle whether {self.mean:+.2g} is real"
        )


def paired(a: Result, b: Result, *, higher_is_better: bool | None = None) -> Difference:
    """The paired difference a - b of the ``samples`` of two results.

    ``higher_is_better`` is what the rows say, and false where they say nothing.

    Raises:
        DataError: the two were not measured example by example on the same data.
    """
    check_same(a, b)
    differences = [x - y for x, y in zip(a.samples, b.samples, strict=True)]
    counts = [1.0] * len(differences)
    if higher_is_better is None:
        higher_is_better = is_higher_better(a)
    found = difference(
        a.metric, differences, counts, a.documents, higher_is_better=higher_is_better,
        binary={*a.samples, *b.samples} <= {0.0, 1.0},
    )  # fmt: skip
    rows, groups = a.data.get("examples", 0), len(a.samples)
    if rows <= groups:
        return found
    # Each sample stands for several rows of a data set (eval/metrics/huggingface.py): people count
    # rows.
    needed = found.needed and math.ceil(_two_digits(found.needed * rows / groups))
    return replace(found, windows=rows, documents=rows, needed=needed)


def difference(
    metric: str,
    differences: Sequence[float],
    counts: Sequence[float],
    documents: Sequence[int] = (),
    *,
    higher_is_better: bool,
    binary: bool = False,
    level: float = LEVEL,
) -> Difference:
    """The estimate, its interval and the verdict from the differences of sums over examples.

    ``documents`` may be empty: then every example is a unit of its own. ``binary`` scores are 0
    or 1, and so their differences -1, 0 or 1.
    """
    number = len(differences)
    mean = math.fsum(differences) / math.fsum(counts)
    residuals = [d - mean * w for d, w in zip(differences, counts, strict=True)]
    units = by_document(residuals, documents)
    if binary and len(units) == number:
        low, high, stderr = _agresti_min(differences, level)
    else:
        stderr = spread(units) / math.fsum(counts)
        reach = t_quantile((1 + level) / 2, len(units) - 1) * stderr
        low, high = mean - reach, mean + reach
    verdict, needed = SAME, None
    if low > 0 or high < 0:
        verdict = BETTER if (mean > 0) == higher_is_better else WORSE
    elif abs(mean) > NOTHING * stderr:
        normal = statistics.NormalDist()
        reach = (normal.inv_cdf((1 + LEVEL) / 2) + normal.inv_cdf(POWER)) * stderr
        needed = math.ceil(_two_digits(max(number + 1, number * (reach / mean) ** 2)))
    changed = sum(map(bool, differences))
    return Difference(metric, mean, stderr, low, high, number, verdict, len(units), needed, changed)


def is_higher_better(result: Result) -> bool:
    """As the row says; rows of earlier versions, and metrics that do not know, by their name."""
    if result.higher_is_better is None:
        return result.metric in HIGHER_IS_BETTER
    return result.higher_is_better


def spread(residuals: Sequence[float]) -> float:
    """√( G/(G−1) · Σ e² ) over G independent units whose residuals sum to zero."""
    count = len(residuals)
    return math.sqrt(count / (count - 1) * math.fsum(e * e for e in residuals))


def by_document(residuals: Sequence[float], documents: Sequence[int]) -> list[float]:
    """Residuals summed within documents; as they are where fewer than two documents are known."""
    if len(set(documents)) < 2:
        return list(residuals)
    sums: dict[int, float] = defaultdict(float)
    for document, residual in zip(documents, residuals, strict=True):
        sums[document] += residual
    return list(sums.values())


def _agresti_min(differences: Sequence[float], level: float) -> tuple[float, float, float]:
    """(low, high, standard error) of the mean difference of paired 0/1 scores."""
    count = len(differences) + 2
    up = sum(d > 0 for d in differences) + 0.5
    down = sum(d < 0 for d in differences) + 0.5
    middle = (up - down) / count
    stderr = math.sqrt(up + down - (up - down) ** 2 / count) / count
    reach = statistics.NormalDist().inv_cdf((1 + level) / 2) * stderr
    return middle - reach, middle + reach, stderr


def _two_digits(value: float) -> float:
    """Rounded up to two significant digits: more are not known."""
    place = 10.0 ** max(math.floor(math.log10(value)) - 1, 0)
    return math.ceil(value / place) * place


def t_quantile(probability: float, degrees: int) -> float:
    """Student's t: the value that is not exceeded with ``probability`` ≥ 1/2.

    By bisection of the distribution function, a finite sum for whole degrees of freedom
    (Abramowitz & Stegun 26.7.3 and 26.7.4); beyond 1000 degrees by their 26.7.5.
    """
    z = statistics.NormalDist().inv_cdf(probability)
    if degrees > 1000:
        return z + (z**3 + z) / (4 * degrees)
    low, high = 0.0, 1.0
    while _t_within(high, degrees) < 2 * probability - 1:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if _t_within(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return high


def _t_within(t: float, degrees: int) -> float:
    """P(|T| < t)."""
    angle = math.atan(t / math.sqrt(degrees))
    square = math.cos(angle) ** 2
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(odd, degrees - 1, 2):  # Σ of products (2·4·…)/(3·5·…) or (1·3·…)/(2·4·…)
        total += term
        term *= square * (k + 1) / (k + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def check_same(a: Result, b: Result) -> None:
    """Refuse two results that are not of the same examples.

    Raises:
        DataError: saying what differs, and what to run.
    """
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
