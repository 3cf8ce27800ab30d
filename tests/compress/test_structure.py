"""The mathematics of removing channels and repairing seams, against slow and obvious references."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from compress.compressors.structure.depth import RIDGE, Depth, seam
from compress.compressors.structure.width import Narrow, Width, drop, remove
from compress.moments import Moments
from compress.narrowing import staying
from compress.problem import LayerProblem


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens: int, width: int) -> Tensor:
    """Inputs whose channels hang together, so that some can stand in for others."""
    return numbers(tokens, width) @ numbers(width, width, seed=1) + 0.5


def fitted(W: Tensor, X: Tensor, columns: Tensor) -> Tensor:
    """W with some columns only, by least squares over the tokens themselves."""
    out = torch.zeros_like(W)
    out[:, columns] = torch.linalg.lstsq(X[:, columns], X @ W.T).solution.T
    return out


def loss(W: Tensor, V: Tensor, X: Tensor) -> float:
    return float(((X @ (W - V).T) ** 2).sum() / len(X))


@pytest.mark.parametrize("size", [1, 3])
def test_what_stays_is_the_least_squares_answer(size: int) -> None:
    W, X = numbers(5, 12, seed=2), inputs(200, 12)
    A = X.T @ X / len(X)
    solved, errors = remove(W, A, 12 // size, 2, stops=[3, 2])
    kept = (solved != 0).any(0).nonzero()[:, 0]
    assert len(kept) == 2 * size
    assert torch.allclose(solved.double(), fitted(W, X, kept), atol=1e-4)
    assert errors[-1] == pytest.approx(loss(W, solved.double(), X), rel=1e-4)
    assert errors[0] < errors[1]


@pytest.mark.parametrize("size", [1, 2])
def test_the_first_to_go_is_the_cheapest_of_all(size: int) -> None:
    W, X = numbers(4, 8, seed=3), inputs(100, 8)
    solved, _ = remove(W, X.T @ X / len(X), 8 // size, 8 // size - 1)
    options = combinations(range(8 // size), 8 // size - 1)
    costs = {
        kept: loss(W, fitted(W, X, columns), X)
        for kept in options
        for columns in [torch.tensor([u * size + i for u in kept for i in range(size)])]
    }
    best = min(costs, key=lambda kept: costs[kept])
    assert (solved.view(4, -1, size) != 0).any(2).any(0).nonzero()[:, 0].tolist() == list(best)


def test_compensation_is_better_than_dropping_the_same_number() -> None:
    W, X = numbers(6, 16, seed=4), inputs(300, 16)
    A = X.T @ X / len(X)
    solved, _ = remove(W, A, 16, 8)
    dropped = drop(W.float(), A.diagonal().float(), 16, 8)
    assert int((dropped != 0).any(0).sum()) == 8
    assert loss(W, solved.double(), X) < 0.7 * loss(W, dropped.double(), X)


def test_dropping_takes_the_least_power() -> None:
    W = torch.tensor([[1.0, 2.0, 3.0, 1.0]])
    assert drop(W, torch.tensor([1.0, 1.0, 0.1, 9.0]), 4, 2).tolist() == [[0, 2, 0, 1]]
    assert drop(W, torch.ones(4), 2, 1).tolist() == [[0, 0, 3, 1]]


def test_channels_that_are_always_zero_go_first() -> None:
    W, X = numbers(4, 6, seed=5).float(), inputs(80, 6).float()
    X[:, 2] = 0
    problem = LayerProblem.of(W * 5, X.T @ X / len(X))
    solver = Narrow(units={"matrix": 6}, keep={"matrix": 5}, steps={}, prices={})
    assert (solver.solve(problem).dense() != 0).any(0).tolist() == [True] * 2 + [False] + [True] * 3


@pytest.mark.parametrize("turn", [1, -1])
def test_more_is_kept_where_the_error_is(turn: int) -> None:
    X = inputs(200, 16).float()
    plain, redundant = numbers(8, 16, seed=6).float(), numbers(8, 16, seed=7).float()
    redundant[:, 4:] *= 0.01
    problems = [
        LayerProblem.of(W, X.T @ X / len(X), name)
        for name, W in (("plain", plain), ("redundant", redundant))
    ]
    names = ["plain", "redundant"]
    solver = Narrow(
        units=dict.fromkeys(names, 16), keep=dict.fromkeys(names, 8),
        steps=dict.fromkeys(names, 2), prices=dict.fromkeys(names, 10), by_error=True,
    )  # fmt: skip
    keep = solver.prepare(lambda: iter(problems[::turn])).keep  # type: ignore[attr-defined]
    assert keep["plain"] > 8 > keep["redundant"]
    assert sum(keep.values()) <= 16
    assert all(k % 2 == 0 for k in keep.values())


def test_a_bias_takes_up_the_means() -> None:
    """Ŵ and bias together are the least-squares answer with a column of ones."""
    W, X = numbers(4, 6, seed=8), inputs(400, 6) + 3
    mean = X.mean(0)
    moments = Moments((X.T @ X / len(X)).float(), None, mean.float())
    centred = moments.centred()
    solved = remove(W, centred.H.double(), 6, 3)[0]
    kept = (solved != 0).any(0).nonzero()[:, 0]
    ones = torch.cat([X[:, kept], torch.ones(len(X), 1, dtype=X.dtype)], 1)
    wanted = torch.linalg.lstsq(ones, X @ W.T).solution.T
    assert torch.allclose(solved[:, kept].double(), wanted[:, :-1], atol=1e-3)
    shift = moments.shift(W.float(), solved, 0.0)
    assert torch.allclose(shift.double(), wanted[:, -1], atol=1e-2)


def test_means_of_the_original_are_followed_part_of_the_way() -> None:
    mean, wanted = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    moments = Moments(torch.eye(2) * 20, torch.eye(2) * 20, mean, wanted)
    W, V = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]])
    assert moments.shift(W, V, 0.0).tolist() == [1]
    assert moments.shift(W, V, 0.5).tolist() == [2]
    assert moments.shift(W, V, 1.0).tolist() == [3]
    assert moments.centred().G[0].tolist() == [17, -2]


@pytest.mark.parametrize("centred", [False, True])
def test_a_seam_is_ridge_regression(centred: bool) -> None:
    """The same as least squares over tokens with rows added that pull the answer to zero."""
    A, R = inputs(300, 5), numbers(300, 3, seed=9) + 2
    padded = torch.cat([A, torch.ones(300, 1, dtype=A.dtype)], 1)
    change, shift = seam(
        (R.T @ padded / 300).float(), (padded.T @ padded / 300).float(), centred=centred
    )
    if centred:
        A, mean, R, missing = A - A.mean(0), A.mean(0), R - R.mean(0), R.mean(0)
    strength = RIDGE * (A**2).mean() * 300
    pulled = torch.cat([A, torch.eye(5, dtype=A.dtype) * strength**0.5])
    zeros = torch.zeros(5, 3, dtype=A.dtype)
    wanted = torch.linalg.lstsq(pulled, torch.cat([R, zeros])).solution.T
    assert torch.allclose(change.double(), wanted, atol=1e-4)
    if centred:
        assert torch.allclose(shift.double(), missing - wanted @ mean, atol=1e-3)
    else:
        assert shift.tolist() == [0, 0, 0]


def test_units_of_zeros_fill_up_what_should_stay() -> None:
    W = torch.tensor([[0.0, 0, 1, 1, 0, 0, 2, 2, 0, 0]])
    assert staying(W, 5, 2, 1).tolist() == [1, 3]
    assert staying(W, 5, 3, 1).tolist() == [0, 1, 3]
    assert staying(W, 5, 1, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("amount", "count", "multiple", "kept"),
    [(0.25, 384, 32, 288), (0.25, 8, 1, 6), (0.25, 2, 1, 2), (0.5, 2, 1, 1), (0.1, 10, 1, 9),
     (0.3, 100, 32, 64), (0.25, 24, 32, 18), (0.9, 2, 1, 1)],
)  # fmt: skip
def test_how_much_stays(amount: float, count: int, multiple: int, kept: int) -> None:
    assert Width(amount=amount).keeps(count, multiple) == kept


def test_half_a_block_goes_and_half_a_head_stays() -> None:
    assert [Depth(amount=0.25).keeps(n) for n in (1, 2, 6, 8, 32)] == [1, 1, 4, 6, 24]
    assert [Width(amount=0.25).keeps(n) for n in (1, 2, 6, 8, 32)] == [1, 2, 5, 6, 24]
