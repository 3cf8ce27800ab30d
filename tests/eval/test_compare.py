"""Paired differences against the formulas written out slowly."""

from __future__ import annotations

import random

import pytest

from compress.errors import DataError
from eval.benchmarks.simulations import alone, clustered, coverage, right_or_wrong, skewed
from eval.compare import Difference, by_document, difference, paired, t_quantile
from eval.results import Result

TEXT = {"hash": "5be1c0ffee"}
TRIALS = 1500


def result(samples: list[float], metric: str = "nll", **more: object) -> Result:
    fields = {"checkpoint": "x", "value": 0.0, "unit": "nats/token", "data": TEXT} | more
    return Result.model_validate(fields | {"metric": metric, "samples": samples})


def drawn(seed: int, shift: float = 0.0, spread: float = 0.01, count: int = 40) -> list[float]:
    """Windows that share their difficulty and differ by ``shift`` and a little noise."""
    shared, own = random.Random(0), random.Random(seed)
    return [shared.gauss(2, 0.5) + shift + own.gauss(0, spread) for _ in range(count)]


def test_against_the_formula_written_out() -> None:
    a, b = drawn(1, shift=0.05), drawn(2)
    found = paired(result(a), result(b))
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += x - y
    mean = total / len(a)
    squares = 0.0
    for x, y in zip(a, b, strict=True):
        squares += (x - y - mean) ** 2
    stderr = (squares / (len(a) - 1)) ** 0.5 / len(a) ** 0.5
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.stderr == pytest.approx(stderr, rel=1e-12)
    assert found.low == pytest.approx(mean - 2.022691 * stderr, rel=1e-6)  # t of 39 degrees
    assert found.high == pytest.approx(mean + 2.022691 * stderr, rel=1e-6)
    assert found.windows == 40


def test_identical_results_do_not_differ() -> None:
    same = result(drawn(1))
    assert paired(same, same) == Difference(
        "nll", 0.0, 0.0, 0.0, 0.0, 40, "no measurable difference", 40, None
    )
    assert paired(same, same).words == (
        "no measurable difference over 40 examples: equal in every one"
    )


def test_changes_that_cancel_are_not_called_equal() -> None:
    a, b = result([1.0, 0.0] + [1.0] * 30, "acc"), result([0.0, 1.0] + [1.0] * 30, "acc")
    found = paired(a, b, higher_is_better=True)
    assert found.low < found.mean == 0 < found.high
    assert found.words == "no measurable difference over 32 examples: as much gained as lost"
    assert paired(a, a).words == "no measurable difference over 32 examples: equal in every one"
    a, b = result([1.0 + 1e-16, 0.3, *drawn(1)]), result([0.3, 1.0, *drawn(1)])
    b.samples[0] -= 1e-15  # rounding, as of pseudo-values, is no difference either
    assert paired(a, b).needed is None


def test_pairing_sees_what_separate_errors_hide() -> None:
    found = paired(result(drawn(1, shift=0.02)), result(drawn(2)))
    assert found.verdict == "worse"
    assert found.stderr < 0.005  # of either mean it is about 0.08


@pytest.mark.parametrize(
    ("metric", "shift", "verdict"),
    [
        ("nll", 0.1, "worse"),
        ("nll", -0.1, "better"),
        ("nll", 0.0, "no measurable difference"),
        ("top1_agreement", 0.1, "better"),
        ("top1_agreement", -0.1, "worse"),
    ],
)
def test_verdicts(metric: str, shift: float, verdict: str) -> None:
    a, b = result(drawn(3, shift, 0.05), metric), result(drawn(4, 0.0, 0.05), metric)
    assert paired(a, b).verdict == verdict


def test_a_plug_in_says_which_way_is_better() -> None:
    a, b = result(drawn(1, shift=0.1), "accuracy"), result(drawn(2), "accuracy")
    assert paired(a, b).verdict == "worse"
    assert paired(a, b, higher_is_better=True).verdict == "better"


def test_the_interval_holds_the_truth_19_times_in_20() -> None:
    inside = 0
    for seed in range(2000):
        noise = random.Random(seed)
        found = paired(result([noise.gauss(0, 1) for _ in range(6)]), result([0.0] * 6))
        inside += found.low <= 0 <= found.high
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)


def test_windows_of_one_document_are_not_counted_as_independent() -> None:
    assert coverage(clustered, TRIALS) == pytest.approx(0.94, abs=0.02)
    assert coverage(alone, TRIALS) < 0.80


def test_skewed_differences_are_covered_nearly_as_often() -> None:
    assert coverage(skewed, TRIALS) == pytest.approx(0.94, abs=0.02)


@pytest.mark.parametrize(("count", "changed"), [(40, 0.05), (40, 0.4), (250, 0.04)])
def test_scores_of_right_and_wrong_are_covered(count: int, changed: float) -> None:
    draw = right_or_wrong(count, changed)
    assert coverage(draw, TRIALS, binary=True) >= 0.935
    plain = coverage(draw, TRIALS)
    assert count * changed > 2 or plain > 0.96  # intervals of length zero, which hold 0 by luck


def test_right_and_wrong_with_half_a_pair_in_each_cell() -> None:
    a, b = [1.0] * 30 + [0.0] * 10, [1.0] * 26 + [0.0] * 13 + [1.0]
    found = paired(result(a, "acc", higher_is_better=True), result(b, "acc"))
    up, down, count = 4.5, 1.5, 42  # the 2 × 2 table's other diagonal, and all pairs
    stderr = (up + down - (up - down) ** 2 / count) ** 0.5 / count
    assert found.mean == pytest.approx(3 / 40)
    assert found.low == pytest.approx((up - down) / count - 1.959964 * stderr)
    assert found.high == pytest.approx((up - down) / count + 1.959964 * stderr)
    assert paired(result(a, "acc"), result(a, "acc")).high > 0.01  # equal, but of 40 only


def test_the_sample_size_that_is_called_needed_is_enough_four_times_in_five() -> None:
    values = [0.16 + (-1) ** i for i in range(100)]
    found = difference("x", values, [1.0] * 100, higher_is_better=True)
    assert found.verdict == "no measurable difference"
    assert found.needed is not None
    assert f"about {found.needed:,} would settle" in found.words
    spread = found.stderr * 100**0.5
    seen = 0
    for seed in range(300):
        noise = random.Random(seed)
        sample = [noise.gauss(found.mean, spread) for _ in range(found.needed)]
        again = difference("x", sample, [1.0] * len(sample), higher_is_better=True)
        seen += again.verdict == ("better" if found.mean > 0 else "worse")
    assert seen / 300 == pytest.approx(0.8, abs=0.07)


def test_rows_are_counted_where_a_sample_stands_for_several() -> None:
    a, b = drawn(3, spread=0.05), drawn(4, spread=0.05)
    plain = paired(result(a), result(b))
    grouped = paired(result(a, data=TEXT | {"examples": 200}), result(b))
    assert (grouped.mean, grouped.low, grouped.high) == (plain.mean, plain.low, plain.high)
    assert plain.needed is not None
    assert grouped.needed == pytest.approx(5 * plain.needed, rel=0.1)
    assert grouped.words.startswith("no measurable difference over 200 examples; about ")


def test_units_are_documents_where_there_are_at_least_two() -> None:
    assert by_document([1.0, 2.0, -3.0], [7, 8, 7]) == [-2.0, 2.0]
    assert by_document([1.0, 2.0, -3.0], [7, 7, 7]) == [1.0, 2.0, -3.0]
    rows = [result([1.0, 2.0, 4.0], documents=[0, 0, 1]), result([1.0, 1.0, 1.0])]
    found = paired(*rows)
    e = [0 + 1 - 2 * 4 / 3, 3 - 4 / 3]
    assert found.stderr == pytest.approx((2 * (e[0] ** 2 + e[1] ** 2)) ** 0.5 / 3)
    assert (found.windows, found.documents) == (3, 2)


@pytest.mark.parametrize(
    ("degrees", "value"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227),
     (1000, 1.96234), (10**6, 1.95997)],
)  # fmt: skip
def test_t_quantile_against_tables(degrees: int, value: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(value, rel=5e-6)


def test_t_quantile_far_out() -> None:
    assert t_quantile(0.9975, 4) == pytest.approx(5.59757, rel=1e-6)
    assert t_quantile(0.9995, 7) == pytest.approx(5.40788, rel=1e-6)


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (result([1.0, 2.0], data={"hash": "another"}), "different text"),
        (result([1.0, 2.0], data={}), "different text"),
        (result([1.0, 2.0], setup={"stride": 64}), "different settings"),
        (result([1.0, 2.0, 3.0]), "2 and 3 windows"),
        (result([1.0, 2.0], "kl"), "cannot be compared with kl"),
        (result([1.0, float("nan")]), "not a finite number"),
    ],
)
def test_what_cannot_be_paired_is_refused(other: Result, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        paired(result([1.0, 2.0]), other)


def test_one_window_is_not_enough() -> None:
    with pytest.raises(DataError, match="fewer than two windows"):
        paired(result([1.0]), result([1.0]))


def test_weights_may_differ_between_setups() -> None:
    a = result([1.0, 2.0], setup={"weights": "a", "seed": 0})
    b = result([1.0, 2.0], setup={"weights": "b", "seed": 0})
    assert paired(a, b).mean == 0
