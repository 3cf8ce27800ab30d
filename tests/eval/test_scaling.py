"""Scaling laws: known parameters are found again, intervals cover, nothing is extrapolated."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from compress.errors import DataError, RecipeError
from compress.sizes import parse_size
from eval.benchmarks.simulations import ALPHA, FALL, SIZES, A, C, E, G, P, dense, losses
from eval.scaling import budget, degradation, law
from eval.scaling.degradation import Loss
from eval.scaling.equivalent import count, equivalent
from eval.scaling.robust import linear


def test_huber_is_minimised_as_torch_does_it() -> None:
    rng = np.random.default_rng(0)
    X = np.stack([np.ones(12), rng.standard_normal(12)], axis=1)
    y = X @ [1.0, 2.0] + 0.01 * rng.standard_normal(12)
    y[3] += 5  # an outlier
    found = linear(X, y, np.ones((1, 12)), 0.05)[0]
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=500, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-12, tolerance_change=1e-15)  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        prediction = torch.tensor(X) @ theta
        loss = torch.nn.functional.huber_loss(
            prediction, torch.tensor(y), reduction="sum", delta=0.05
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    np.testing.assert_allclose(found, theta.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(found, [1, 2], atol=0.02)  # the outlier does not matter


def test_a_law_without_noise_is_found_exactly_and_all_starts_agree() -> None:
    found = law.fit(SIZES, dense(0, 0), draws=20)
    assert (found.E, found.A, found.alpha) == pytest.approx((E, A, ALPHA), rel=1e-3)


def test_known_parameters_lie_within_their_intervals() -> None:
    found = law.fit(SIZES, dense(0.005, 3))
    low, high = np.percentile(found.draws, [2.5, 97.5], axis=0)
    assert np.all(low <= [E, A, ALPHA])
    assert np.all(high >= [E, A, ALPHA])


def test_intervals_of_equivalents_cover_the_truth() -> None:
    true, original = 1.2e6, 1.5e6
    lost = A * true**-ALPHA - A * original**-ALPHA
    trials, hits = 40, 0
    for seed in range(trials):
        curve = law.fit(SIZES, dense(0.005, seed), draws=100)
        measured = lost + 0.002 * random.Random(seed).gauss(0, 1)
        found = equivalent(curve, int(original), measured, 0.002)
        hits += found.low <= true <= found.high
    assert hits >= 34  # 95% of 40 is 38
    assert found.high / found.low < 1.1


def test_an_outlier_moves_the_law_less_than_its_size() -> None:
    bent = dense(0.001, 1)
    bent[2] *= 1.05
    assert law.fit(SIZES, bent, draws=5).nll(1.5e6)[0] == pytest.approx(
        E + A * 1.5e6**-ALPHA, rel=0.01
    )


def test_few_sizes_are_interpolated_and_never_rise() -> None:
    curve = law.curve([1e5, 1e6, 1e7], [4.0, 3.0, 3.1], np.full((50, 3), 0.01))
    assert isinstance(curve, law.Interpolation)
    assert curve.nll(math.sqrt(1e11))[0] == pytest.approx((4 + 3.05) / 2)
    assert curve.nll(2e6)[0] == curve.nll(5e6)[0] == pytest.approx(3.05)  # pooled
    found = equivalent(curve, 1_000_000, 0.475, 0.0)
    assert found.parameters == pytest.approx(math.sqrt(1e11), rel=0.02)
    with pytest.raises(ValueError, match="two sizes"):
        law.curve([1e5, 1e5], [4.0, 4.1], np.zeros((5, 2)))


def test_equivalents_are_the_formula_and_stop_where_the_ladder_does() -> None:
    curve = law.fit(SIZES, dense(0, 0), draws=50)
    loss = 0.05
    found = equivalent(curve, 1_500_000, loss, 0.001)
    by_hand = (1.5e6**-ALPHA + loss / A) ** (-1 / ALPHA)
    assert found.parameters == pytest.approx(by_hand, rel=1e-3)
    assert found.low < found.parameters < found.high
    assert found.share == pytest.approx(by_hand / 1.5e6, rel=1e-3)
    ruined = equivalent(curve, 1_500_000, 9.0, 0.1)
    assert ruined.parameters is None
    assert ruined.text == "less than 50k"
    assert equivalent(curve, 1_500_000, -9.0, 0.1).text == "more than 14M"
    assert [count(N) for N in (999_900, 1_443_456, 102_624, 12)] == ["1M", "1.44M", "103k", "12"]


def test_a_degradation_law_is_found_again_within_its_intervals() -> None:
    found = degradation.fit(losses([2, 3, 4, 5, 6], [400_000, 1_500_000, 6_000_000], [32, 128]))
    assert found.form == "exponential"
    assert found.names == ("c", "p", "g", "a")
    low, high = np.percentile(found.draws, [2.5, 97.5], axis=0)
    for value, true, floor, ceiling in zip(
        found.coefficients[1:], (P, G, FALL), low[1:], high[1:], strict=True
    ):
        assert floor <= true <= ceiling
        assert value == pytest.approx(true, abs=0.06)


@pytest.mark.parametrize("form", ["power", "exponential", "odds"])
def test_the_form_is_chosen_by_what_it_predicts(form: str) -> None:
    shares = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    x = {"power": math.log, "exponential": lambda s: s, "odds": lambda s: math.log(s / (1 - s))}
    made = [
        Loss(str(s), "svd", "ratio", 1 - s, 1, 10**6, math.exp(2 * x[form](s)), 1e-6)
        for s in shares
    ]
    found = degradation.fit(made)
    assert found.form == form
    assert found.coefficients[1] == pytest.approx(2, rel=1e-3)


def test_predictions_are_within_their_intervals_and_of_held_out_checkpoints_too() -> None:
    made = losses([2, 3, 4, 5, 6], [400_000, 1_500_000, 6_000_000], [32, 128], scatter=0.1)
    kept, chosen = degradation.held_out(made)
    assert len(chosen) == 10
    assert not {loss.value for loss in chosen} & {2, 6}  # ends are never held out
    found = degradation.fit(kept)
    inside = 0
    for loss in chosen:
        said = found.predict(loss.value, group=loss.group, parameters=loss.parameters)
        assert said.delta == pytest.approx(loss.delta, rel=0.4)
        inside += said.low <= loss.delta <= said.high
    assert inside >= 8


def test_intervals_of_predictions_cover_new_measurements() -> None:
    trials, hits = 60, 0
    for seed in range(trials):
        *made, new = losses([2, 3, 4, 5, 6, 4.5], [1_000_000], [64], scatter=0.1, seed=seed)
        said = degradation.fit(made, draws=200).predict(4.5)
        hits += said.low <= new.delta <= said.high
    assert hits >= 52  # 95% of 60 is 57


def test_nothing_is_extrapolated() -> None:
    found = degradation.fit(losses([3, 4, 5], [400_000, 800_000], [32, 128]))
    assert found.predict(4.5, parameters=1_600_000).delta > 0
    with pytest.raises(DataError, match="bits=2 is outside what was measured, 3 to 5"):
        found.predict(2)
    with pytest.raises(DataError, match="2M parameters is beyond 2 times the sizes"):
        found.predict(4, parameters=2_000_000)
    with pytest.raises(DataError, match="group=256 is outside"):
        found.predict(4, group=256)
    one = degradation.fit(losses([3, 4, 5, 6], [400_000], [64]))
    with pytest.raises(DataError, match="only models of 400k parameters were measured"):
        one.predict(4, parameters=500_000)


def test_losses_within_the_noise_are_left_out_and_too_few_are_an_error() -> None:
    made = losses([3, 4, 5, 6], [400_000], [64])
    silent = Loss("rtn-8", "rtn", "bits", 8, 64, 400_000, -0.0001, 0.001)
    found = degradation.fit([*made, silent])
    assert [loss.name for loss in found.unseen] == ["rtn-8"]
    assert found.settings == (3, 8)
    with pytest.raises(DataError, match="three settings"):
        degradation.fit([*made[:2], silent])


def test_the_best_within_a_budget() -> None:
    made = losses([2, 3, 4, 6], [1_000_000], [32, 128], scatter=0.01)
    found = degradation.fit(made)
    # At 64 kB·(b + 16/group + 3): 5 bits of group 128 take 1.016 MB; of group 32, 1.0625 MB.
    choices = budget.best([found], 1_020_000, 1_000_000)
    assert [(c.prediction.value, c.prediction.group) for c in choices] == [(5, 128), (4, 32)]
    assert choices[0].size == pytest.approx(1e6 / 8 * (5 + 16 / 128 + 3))
    assert parse_size("30%", 1000) == 300
    assert parse_size("500KB", 1) == 500_000
    assert parse_size("1.5MiB", 1) == 1.5 * 2**20
    with pytest.raises(RecipeError, match="30% or 500KB"):
        parse_size("many", 1)


def test_the_best_bits_for_a_size_of_ones_own() -> None:
    curve = law.fit(SIZES, dense(0, 0))
    found = degradation.fit(losses([2, 3, 4, 5, 6], [400_000, 1_500_000, 6_000_000], [64], 0.01))
    mixes = budget.best_bits(found, curve, 1e6)
    by_bits = {mix.bits: mix for mix in mixes}
    assert mixes[0].nll == min(mix.nll for mix in mixes)
    assert by_bits[4].parameters > by_bits[6].parameters > by_bits[16].parameters
    assert by_bits[4].parameters == pytest.approx(8e6 / (4 + 16 / 64 + 3), rel=0.02)
    N = by_bits[4].parameters
    exact = E + A * N**-ALPHA + math.exp(C - 4 * P - FALL * math.log(N / 1e6)) * 64**G
    assert by_bits[4].nll == pytest.approx(exact, abs=0.01)
