"""GPTQ and its polish against slow, obvious references."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import normal
from torch import Tensor

from compress.compressors.pruning.masks import keep_share
from compress.compressors.quantization.gptq import (
    GPTQ,
    descend,
    refit_scales,
    round_with_feedback,
)
from compress.compressors.quantization.grid import Grid, search_grid
from compress.compressors.quantization.rtn import RTN
from compress.moments import Moments
from compress.problem import LayerProblem, relative_error
from compress.weights import Dense, Sparse


def moments(width: int, tokens: int = 200) -> Moments:
    X = normal(tokens, width, seed=1, scale=1) @ normal(width, width, seed=2, scale=1)
    return Moments(X.T @ X / tokens)


def grid_for(W: Tensor, bits: int, group: int, symmetric: bool = True) -> Grid:
    ones = torch.ones(W.shape[1])
    return search_grid(W, ones, bits=bits, group=group, symmetric=symmetric, dtype=torch.float16)


def row_loss(codes: Tensor, T: Tensor, grid: Grid, H: Tensor) -> Tensor:
    """float64 [out], Σ over the row of (Ŵ − T) H (Ŵ − T)ᵀ."""
    D = (grid.values(codes) - T).double()
    return ((D @ H.double()) * D).sum(1)


def slow_feedback(T: Tensor, grid: Grid, H: Moments) -> Tensor:
    """Optimal brain surgery with a fresh inverse at every step."""
    order = H.H.diagonal().argsort(descending=True, stable=True).tolist()
    s, z = grid.spread(T.shape[1])
    W, codes = T.double().clone(), torch.zeros(T.shape, dtype=torch.uint8)
    while order:
        inverse = torch.linalg.inv(H.damped[order][:, order])
        j = order[0]
        code = grid.round(W[:, j].float(), s[:, j], z[:, j])
        codes[:, j] = code.to(torch.uint8)
        error = (W[:, j] - ((code - z[:, j]) * s[:, j]).double()) / inverse[0, 0]
        W[:, order] -= error[:, None] * inverse[0]
        order = order[1:]
    return codes


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False), (2, True)])
def test_feedback_is_optimal_brain_surgery(bits: int, symmetric: bool) -> None:
    T, H = normal(16, 150), moments(150, 400)  # more columns than a block
    grid = grid_for(T, bits, 32, symmetric)
    same = round_with_feedback(T, grid, H) == slow_feedback(T, grid, H)
    assert same.float().mean() > 0.999  # a tie may fall either way in float32


def test_descent_never_rises_and_ends_where_no_code_alone_can_be_better() -> None:
    T, H = normal(8, 24), moments(24)
    grid = grid_for(T, 3, 8)
    codes = grid.codes(T)
    damped = H.damped
    before = row_loss(codes, T, grid, damped)
    for _ in range(40):
        codes = descend(codes, T, grid, H)
        after = row_loss(codes, T, grid, damped)
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    for j in range(24):
        for value in range(8):
            other = codes.clone()
            other[:, j] = value
            assert (row_loss(other, T, grid, damped) >= before * (1 - 1e-5)).all()


def test_refit_is_the_least_squares_scale_of_every_group() -> None:
    T, H = normal(5, 20), moments(20)
    grid = grid_for(T, 3, 8)
    grid = Grid(grid.scale.float() * 1.3, grid.zero, 3, 8, True)  # far off, exact storage
    codes = grid.codes(T)
    found, left = refit_scales(codes, T, grid, H)
    assert left == pytest.approx(float(row_loss(codes, T, found, H.damped).sum()), rel=1e-4)
    root = torch.linalg.cholesky(H.damped)
    steps = codes.double() - 4
    for row in range(5):
        columns = [root[8 * g : 8 * g + 8].T @ steps[row, 8 * g : 8 * g + 8] for g in range(3)]
        wanted = root.T @ T[row].double()
        best = torch.linalg.lstsq(torch.stack(columns, 1), wanted[:, None]).solution[:, 0]
        torch.testing.assert_close(found.scale[row].double(), best, rtol=1e-3, atol=1e-5)


def test_close_to_the_best_there_is() -> None:
    """All 4^6 codings of each row, on the grid that was searched."""
    T, H = normal(12, 6), moments(6)
    grid = grid_for(T, 2, 8)
    every = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.uint8)
    codes = descend(round_with_feedback(T, grid, H), T, grid, H)
    ours, plain = (row_loss(c, T, grid, H.damped) for c in (codes, grid.codes(T)))
    best = torch.stack(
        [
            row_loss(every, T[r : r + 1], Grid(grid.scale[r : r + 1].expand(len(every), 1),
                 grid.zero[r : r + 1].expand(len(every), 1), 2, 6, True), H.damped).min()
            for r in range(12)
        ]
    )  # fmt: skip
    assert (ours >= best * (1 - 1e-6)).all()
    assert (ours - best).sum() < 0.5 * (plain - best).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [8, 32, "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_better_than_rounding_to_nearest(bits: int, group: int | str, symmetric: bool) -> None:
    H = moments(100)
    problem = LayerProblem("site", Dense.of(normal(40, 100)), H)
    setting = {"bits": bits, "group": group, "symmetric": symmetric}
    ours, plain = GPTQ(**setting).solve(problem), RTN(**setting).solve(problem)
    assert relative_error(problem, ours) < 0.8 * relative_error(problem, plain)
    assert ours.nbytes == plain.nbytes
    unpolished = GPTQ(polish=0, **setting).solve(problem)
    assert relative_error(problem, ours) < relative_error(problem, unpolished)


@pytest.mark.parametrize("trouble", ["dead", "one token", "nothing", "outliers", "zeros"])
def test_awkward_problems(trouble: str) -> None:
    W = normal(16, 40)
    X = normal(200, 40, seed=3, scale=1)
    if trouble == "dead":
        X[:, ::3] = 0
    elif trouble == "one token":
        X = X[:1]
    elif trouble == "nothing":
        X = 0 * X
    elif trouble == "outliers":
        W[::5, ::7] *= 300
        W = W.to(torch.bfloat16)
    elif trouble == "zeros":
        W = 0 * W
    problem = LayerProblem("site", Dense.of(W), Moments(X.T @ X / len(X)))
    weight, _ = GPTQ(bits=3, group=16).best(problem)
    assert torch.isfinite(weight.dense()).all()
    plain = RTN(bits=3, group=16).solve(problem)
    assert relative_error(problem, weight) <= relative_error(problem, plain)


def test_the_goal_is_what_is_approximated() -> None:
    W, goal, H = normal(16, 40), normal(16, 40, seed=5), moments(40)
    weight = GPTQ(bits=4, group=8).solve(LayerProblem("site", Dense.of(W), H, goal))
    towards = relative_error(LayerProblem("site", Dense.of(goal), H), weight)
    assert towards < 0.01 < relative_error(LayerProblem("site", Dense.of(W), H), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_of_a_pruned_weight_stay(symmetric: bool) -> None:
    """And what the others make up for pays: better than rounding the kept ones alone."""
    W, H = normal(24, 60), moments(60)
    keep = keep_share(W.abs(), 0.5)
    sparse = Sparse.of(W, keep)
    problem = LayerProblem("site", sparse, H)
    setting = {"bits": 3, "group": 16, "symmetric": symmetric}
    weight = GPTQ(**setting).solve(problem)
    assert (weight.dense()[~keep] == 0).all()
    plain = RTN(**setting).solve(problem)
    assert (plain.dense()[~keep] == 0).all()
    assert relative_error(problem, weight) < 0.8 * relative_error(problem, plain)
    # the target may have entries there: the inputs that remain stand in for them
    towards = LayerProblem("site", sparse, H, W)
    assert (GPTQ(**setting).solve(towards).dense()[~keep] == 0).all()
