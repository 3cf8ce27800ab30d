"""Paired differences against the formulas written out slowly."""

from __future__ import annotations

import random

import pytest

from compress.errors import DataError
from eval.compare import Difference, paired, t_quantile_975
from eval.results import Result

TEXT = {"hash": "5be1c0ffee"}


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
        "nll", 0.0, 0.0, 0.0, 0.0, 40, "no measurable difference"
    )


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


@pytest.mark.parametrize(
    ("degrees", "value"),
    [(1, 12.7062), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227), (10**6, 1.95997)],
)
def test_t_quantile_against_tables(degrees: int, value: float) -> None:
    assert t_quantile_975(degrees) == pytest.approx(value, rel=5e-4)


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
