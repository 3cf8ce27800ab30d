"""The grid search against brute force over a fine lattice of scales and zero-points."""

from __future__ import annotations

import pytest
import torch
from tiny import normal
from torch import Tensor

from compress.compressors.quantization import grid as grid_module
from compress.compressors.quantization.grid import Grid, search_grid

BITS = [2, 3, 4]


def search(W: Tensor, bits: int, symmetric: bool, group: int = 8, h: Tensor | None = None) -> Grid:
    importance = torch.ones(W.shape[1]) if h is None else h
    return search_grid(
        W, importance, bits=bits, group=group, symmetric=symmetric, dtype=torch.float32
    )


def error(W: Tensor, grid: Grid, h: Tensor | None = None) -> float:
    importance = torch.ones(W.shape[1]) if h is None else h
    return float(((grid.values(grid.codes(W)) - W).square() * importance).sum())


def rounded(w: Tensor, h: Tensor, scale: float, zero: int, bits: int) -> float:
    """Σ h (ŵ − w)², one weight at a time."""
    total = 0.0
    for value, weight in zip(w.tolist(), h.tolist(), strict=True):
        code = min(max(round(value / scale) + zero, 0), 2**bits - 1)
        total += weight * ((code - zero) * scale - value) ** 2
    return total


def brute_force(w: Tensor, h: Tensor, bits: int, symmetric: bool, points: int = 250) -> float:
    """The least error of one group over ``points`` scales, every zero-point, both signs."""
    reach = max(float(w.max()), 0.0) - min(float(w.min()), 0.0)
    zeros = [2 ** (bits - 1)] if symmetric else range(2**bits)
    best = float("inf")
    for i in range(1, points + 1):
        scale = 1.2 * reach * i / points / (1 if symmetric else 2**bits - 1)
        for zero in zeros:
            for sign in (1, -1) if symmetric else (1,):
                best = min(best, rounded(w, h, sign * scale, zero, bits))
    return best


def min_max(w: Tensor, h: Tensor, bits: int, symmetric: bool) -> float:
    """Error of the usual grid that spans the group's range."""
    low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    if symmetric:
        scale = max(-low, high) / (2 ** (bits - 1) - 1)
        return rounded(w, h, scale, 2 ** (bits - 1), bits)
    scale = (high - low) / (2**bits - 1)
    return rounded(w, h, scale, round(-low / scale), bits)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("weighted", [False, True])
def test_close_to_brute_force_and_never_worse_than_min_max(
    bits: int, symmetric: bool, weighted: bool
) -> None:
    W = normal(12, 16, seed=bits) + (0.03 if not symmetric else 0.0)
    W[3, 2] = 0.4  # an outlier
    h = normal(16, seed=5).abs() * 20 + 0.1 if weighted else torch.ones(16)
    grid = search(W, bits, symmetric, group=16, h=h)
    ours, best = 0.0, 0.0
    for i in range(len(W)):
        row = error(W[i : i + 1], Grid(grid.scale[[i]], grid.zero[[i]], bits, 16, symmetric), h)
        usual = min_max(W[i], h, bits, symmetric)
        assert row <= usual * 1.0001, (i, row, usual)
        ours += row
        best += brute_force(W[i], h, bits, symmetric)
    assert ours <= best * 1.1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_and_constant_groups(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    W = torch.cat([torch.zeros(2, 16), torch.full((2, 16), 0.37), torch.full((2, 16), -0.37)])
    grid = search_grid(W, torch.ones(16), bits=bits, group=8, symmetric=symmetric, dtype=dtype)
    assert torch.isfinite(grid.scale).all()
    assert (grid.scale != 0).all()
    values = grid.values(grid.codes(W))
    assert torch.equal(values[:2], W[:2])
    torch.testing.assert_close(values, W, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_short_last_group_is_searched_for_itself(symmetric: bool) -> None:
    W = normal(6, 21)
    whole = search(W, 3, symmetric, group=8)
    last = search(W[:, 16:], 3, symmetric, group=8)
    assert whole.scale.shape == (6, 3)
    assert last.group == 5
    torch.testing.assert_close(whole.scale[:, 2:], last.scale)
    assert torch.equal(whole.codes(W)[:, 16:], last.codes(W[:, 16:]))


def test_codes_are_the_nearest_points() -> None:
    W = normal(4, 16)
    grid = search(W, 3, symmetric=False)
    codes = grid.codes(W)
    assert codes.max() < 8
    for other in range(8):
        there = grid.values(torch.full_like(codes, other))
        assert ((grid.values(codes) - W).abs() <= (there - W).abs() + 1e-7).all()


def test_zero_points_are_integers_on_the_grid() -> None:
    grid = search(normal(8, 32) + 0.1, 4, symmetric=False)
    assert torch.equal(grid.zero, grid.zero.round().clamp(0, 15))
    assert (search(normal(8, 32), 4, symmetric=True).zero == 8).all()


def test_a_symmetric_grid_turns_its_longer_arm_to_the_longer_tail() -> None:
    W = torch.tensor([[-0.1, 0.0, 0.1, 0.2, 0.05, -0.05, 0.15, 0.1]])
    assert search(W, 2, symmetric=True).scale.item() < 0
    assert search(-W, 2, symmetric=True).scale.item() > 0


def test_scales_are_rounded_before_weights_are() -> None:
    W = normal(8, 32)
    grid = search_grid(W, torch.ones(32), bits=8, group=32, symmetric=True, dtype=torch.bfloat16)
    assert grid.scale.dtype == torch.bfloat16
    best = error(W, grid)
    nudged = Grid(grid.scale.float() * 1.001, grid.zero, 8, 32, True)
    assert best <= error(W, Grid(nudged.scale.bfloat16(), grid.zero, 8, 32, True))
    step = grid.scale.float().abs()
    inside = W.abs() < step * 126
    assert ((grid.values(grid.codes(W)) - W).abs() <= 0.5001 * step)[inside].all()


def test_rows_are_searched_alike_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    W = normal(10, 24)
    whole = search(W, 4, symmetric=False)
    monkeypatch.setattr(grid_module, "CHUNK", 48)
    parts = search(W, 4, symmetric=False)
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.zero, parts.zero)
