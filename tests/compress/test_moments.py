"""Second moments against their definitions."""

from __future__ import annotations

import pytest
import torch
from tiny import normal

from compress.moments import DAMPING, TILE, Moments, gathered


def inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """float32 [tokens, width], correlated."""
    return normal(tokens, width, seed=seed, scale=1) @ normal(width, width, seed=9, scale=1)


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    X = inputs(50, 8)
    H = X.T @ X / 50
    added = Moments(H).damped - H.double()
    expected = DAMPING * H.diagonal().double().mean() * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(added, expected)


def test_dead_inputs_neither_weaken_nor_break_the_damping() -> None:
    X = inputs(50, 8)
    X[:, 3] = 0
    moments = Moments(X.T @ X / 50)
    assert moments.dead.tolist() == [i == 3 for i in range(8)]
    alive = moments.H.diagonal()[~moments.dead].mean().double()
    assert moments.damped[3, 3].item() == pytest.approx((alive * (1 + DAMPING)).item())


@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize("descending", [True, False])
def test_the_factor_is_that_of_the_inverse(tokens: int, descending: bool) -> None:
    X = inputs(tokens, 12)
    moments = Moments(X.T @ X / tokens)
    order, U = moments.inverse_factor(descending=descending)
    if descending:
        assert (moments.H.diagonal()[order].diff() <= 0).all()
    else:
        assert order.tolist() == list(range(12))
    assert torch.equal(U, U.triu())
    inverse = torch.linalg.inv(moments.damped[order][:, order])
    torch.testing.assert_close((U.T @ U).double(), inverse, rtol=1e-3, atol=1e-5)


def test_nothing_at_all_was_read() -> None:
    moments = Moments(torch.zeros(5, 5))
    assert moments.dead.all()
    assert torch.isfinite(moments.inverse_factor()[1]).all()


def test_an_indefinite_matrix_is_damped_until_it_is_not() -> None:
    H = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.2]))
    assert (torch.linalg.eigvalsh(Moments(H).damped) > 0).all()


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_corrected_weight_is_the_least_squares_answer(strength: float) -> None:
    W, X = normal(6, 10), inputs(400, 10)
    seen = X + 0.3 * inputs(400, 10, seed=4)
    moments = Moments(seen.T @ seen / 400, seen.T @ X / 400)
    ridge = DAMPING * moments.H.diagonal().mean() * 400
    # min ‖seen Vᵀ − X Wᵀ‖² + ridge ‖V − W‖², by stacking
    rows = torch.cat([seen, ridge.sqrt() * torch.eye(10)])
    wanted = torch.cat([X @ W.T, ridge.sqrt() * W.T])
    best = torch.linalg.lstsq(rows.double(), wanted.double()).solution.T.float()
    expected = (1 - strength) * W + strength * best
    torch.testing.assert_close(moments.corrected(W, strength), expected, rtol=1e-3, atol=1e-5)


def test_without_the_original_model_nothing_is_corrected() -> None:
    W, X = normal(6, 10), inputs(40, 10)
    assert torch.equal(Moments(X.T @ X / 40).corrected(W, 0.5), W)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_batches_are_the_moments(dtype: torch.dtype, weighted: bool) -> None:
    width, tokens = TILE + 9, (300, 500)
    seen = [inputs(count, width, seed=count).to(dtype) for count in tokens]
    wanted = [(x + 0.1 * inputs(len(x), width, seed=3)).to(dtype) for x in seen]
    counts = [torch.rand(len(x)) for x in seen] if weighted else None
    batches = [(n, [x[None], y[None]]) for n, (x, y) in enumerate(zip(seen, wanted, strict=True))]
    found = gathered(batches, width, counts)
    X, Y = torch.cat(seen).double(), torch.cat(wanted).double()
    left = X * torch.cat(counts)[:, None] if counts else X
    H = left.T @ X / 800
    assert torch.equal(found.H, found.H.T)
    assert (found.H - H).norm() < 2e-6 * H.norm()  # of bfloat16, too: only the sums are rounded
    assert found.G is not None
    change, expected = found.G - found.H, left.T @ (Y - X) / 800
    assert (change - expected).norm() < (1e-5 if dtype == torch.float32 else 4e-3) * expected.norm()
    assert found.mean is not None
    torch.testing.assert_close(found.mean, left.mean(0).float(), rtol=1e-4, atol=1e-4)
    assert found.wanted_mean is not None
    weights = torch.cat(counts)[:, None] if counts else 1
    wanted_mean = (weights * Y).mean(0).float()
    torch.testing.assert_close(found.wanted_mean, wanted_mean, rtol=1e-2, atol=1e-2)


def test_a_batch_that_the_original_does_not_bring_leaves_its_moments_out() -> None:
    X = inputs(20, 6)
    for other in (None, X[:10]):
        found = gathered([(0, [X, X]), (1, [X, other])], 6, None)
        assert found.G is None
        torch.testing.assert_close(found.H, X.T @ X / 20)
