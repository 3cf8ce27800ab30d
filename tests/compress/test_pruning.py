"""Calibrated pruning against slow, obvious references."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny import normal
from torch import Tensor

from compress.api import compressor
from compress.compressors.base import CalibratedCompressor
from compress.compressors.pruning.admm import ADMM, conjugate_gradients
from compress.compressors.pruning.magnitude import Magnitude
from compress.compressors.pruning.masks import keep_n_of_m, keep_share
from compress.compressors.pruning.sparsegpt import SparseGPT
from compress.compressors.pruning.wanda import Wanda
from compress.errors import RecipeError
from compress.moments import Moments
from compress.problem import LayerProblem, relative_error
from compress.weights import Dense

METHODS = [Wanda, SparseGPT, ADMM]
SETTINGS: list[dict[str, Any]] = [
    {"sparsity": 0.5},
    {"sparsity": 0.8},
    {"pattern": "2:4"},
    {"pattern": "4:8"},
]


def moments(width: int, tokens: int = 300) -> Moments:
    X = normal(tokens, width, seed=1, scale=1) @ normal(width, width, seed=2, scale=1)
    return Moments(X.T @ X / tokens)


def problem(rows: int = 24, columns: int = 64) -> LayerProblem:
    return LayerProblem("site", Dense.of(normal(rows, columns)), moments(columns))


def best_for(T: Tensor, keep: Tensor, H: Tensor) -> Tensor:
    """float64: the least-squares weights of each row on its own support."""
    found = torch.zeros_like(T, dtype=torch.float64)
    for row, kept in enumerate(keep):
        S = kept.nonzero()[:, 0]
        found[row, S] = torch.linalg.solve(H[S][:, S], (H @ T[row].double())[S])
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_as_many_go_as_were_asked_for(
    method: type[CalibratedCompressor], setting: dict[str, Any]
) -> None:
    given = problem()
    kept = method(**setting).solve(given).dense() != 0
    if "pattern" in setting:
        n, m = map(int, setting["pattern"].split(":"))
        assert (kept.view(24, -1, m).sum(2) == n).all()
    else:
        assert (~kept).sum().item() == pytest.approx(setting["sparsity"] * 24 * 64, abs=24)


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_is_better_than_the_one_before(setting: dict[str, Any]) -> None:
    given = problem(48, 96)
    magnitude = Magnitude(**setting | ({} if "pattern" in setting else {"per": "row"}))
    plain, wanda, sparsegpt, admm = (
        relative_error(given, solver.solve(given))
        for solver in (magnitude, *(method(**setting) for method in METHODS))
    )
    assert wanda < plain
    if setting != {"sparsity": 0.8}:  # its masks, greedy by blocks, are poor there
        assert sparsegpt < wanda
    assert admm < 0.8 * sparsegpt


def test_wanda_keeps_the_largest_products_of_each_row() -> None:
    given = problem(6, 20)
    W, H = given.W, given.H
    assert H is not None
    made = Wanda(sparsity=0.3).solve(given).dense()
    for row in range(6):
        scores = [(abs(W[row, j]) * H[j, j] ** 0.5).item() for j in range(20)]
        gone = sorted(range(20), key=scores.__getitem__)[:6]
        expected = [0.0 if j in gone else W[row, j].item() for j in range(20)]
        assert made[row].tolist() == expected


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_sparsegpt_is_surgery_with_a_fresh_inverse_at_every_input(pattern: str | None) -> None:
    given = problem(10, 148)  # two blocks of inputs
    assert given.moments is not None
    damped = given.moments.damped
    W = given.W.double()
    keep = torch.ones_like(W, dtype=torch.bool)
    for j in range(148):
        inverses = [torch.linalg.inv(damped[i:, i:]) for i in range(j, min(j + 4, 148))]
        if pattern is None and j % 128 == 0:
            ends = range(j, min(j + 128, 148))
            diagonal = torch.stack([torch.linalg.inv(damped[i:, i:])[0, 0] for i in ends])
            keep[:, j : j + 128] = keep_share(W[:, j : j + 128].square() / diagonal, 0.5)
        elif pattern and j % 4 == 0:
            diagonal = torch.stack([inverse[0, 0] for inverse in inverses])
            keep[:, j : j + 4] = keep_n_of_m(W[:, j : j + 4].square() / diagonal, 2, 4)
        error = W[:, j].masked_fill(keep[:, j], 0) / inverses[0][0, 0]
        W[:, j:] -= error[:, None] * inverses[0][0]
    setting = {"pattern": pattern} if pattern else {"sparsity": 0.5}
    made = SparseGPT(**setting).solve(given).dense()
    assert ((made != 0) == keep).float().mean() > 0.995
    torch.testing.assert_close(made[made != 0], W.float()[made != 0], rtol=0.05, atol=0.02)


def test_conjugate_gradients_find_the_best_weights_of_a_mask() -> None:
    given = problem(8, 40)
    assert given.moments is not None
    H, T = given.moments.damped, given.W
    keep = keep_share(T.abs(), 0.5)
    start = T * keep
    found = conjugate_gradients(start, keep, H.float(), T @ H.float(), 200)
    assert (found[~keep] == 0).all()
    torch.testing.assert_close(found.double(), best_for(T, keep, H), rtol=2e-2, atol=1e-3)


def test_admm_is_close_to_the_best_of_all_masks() -> None:
    """Every choice of 4 of 8 inputs, with the best weights for it; each row a matrix of its own."""
    H = moments(8)
    total = best_total = plain_total = 0.0
    for seed in range(12):
        T = normal(1, 8, seed=seed)
        given = LayerProblem("site", Dense.of(T), H)

        def error(Z: Tensor, T: Tensor = T) -> float:
            D = Z.double() - T.double()
            return ((D @ H.damped) * D).sum().item()

        masks = [
            torch.tensor([[i in chosen for i in range(8)]])
            for chosen in itertools.combinations(range(8), 4)
        ]
        best_total += min(error(best_for(T, keep, H.damped)) for keep in masks)
        total += error(ADMM(sparsity=0.5).solve(given).dense())
        keep = keep_share(T.abs() * H.damped.diagonal().sqrt(), 0.5)
        plain_total += error(best_for(T, keep, H.damped))
    assert best_total * (1 - 1e-6) <= total
    assert total < 0.95 * plain_total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trouble", ["dead", "one token", "nothing", "outliers", "zeros"])
def test_awkward_problems(method: type[CalibratedCompressor], trouble: str) -> None:
    W, X = normal(16, 40), normal(200, 40, seed=3, scale=1)
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
    given = LayerProblem("site", Dense.of(W), Moments(X.T @ X / len(X)))
    weight, _ = method(sparsity=0.5).best(given)
    assert torch.isfinite(weight.dense()).all()
    plain = Magnitude(sparsity=0.5).solve(given)
    assert relative_error(given, weight) <= relative_error(given, plain)


def test_a_model_in_memory_has_no_text() -> None:
    with pytest.raises(RecipeError, match=r"use compress\.apply with a recipe"):
        compressor("admm").apply(torch.nn.Linear(4, 4))


@pytest.mark.parametrize("method", METHODS)
def test_a_width_that_the_pattern_does_not_divide(method: type[CalibratedCompressor]) -> None:
    with pytest.raises(RecipeError, match="divisible by 4"):
        method(pattern="2:4").solve(problem(4, 42))
