"""Learned rounding: where it starts, what it may change, and what is stored."""

from __future__ import annotations

import pytest
import torch
from tiny import normal

from compress.compressors.quantization.rounding import Rounding
from compress.compressors.quantization.rtn import RTN
from compress.weights import Quantized

SETTINGS = [(2, True, 16), (3, False, 16), (4, True, 64), (8, False, 16)]


def made(bits: int, symmetric: bool, group: int) -> tuple[torch.Tensor, Quantized, Rounding]:
    W = normal(12, 40)
    weight = RTN(bits=bits, group=group, symmetric=symmetric)(W)
    assert isinstance(weight, Quantized)
    return W, weight, Rounding(weight.spec, dict(weight.tensors), W)


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_starts_with_the_weight_as_it_was(setting: tuple[int, bool, int]) -> None:
    _, weight, rounding = made(*setting)
    torch.testing.assert_close(rounding(), weight.dense())
    again = rounding.packed(weight)
    assert again.spec == weight.spec
    for name, tensor in weight.tensors.items():
        assert torch.equal(again.tensors[name], tensor), name


def test_another_matrix_is_no_guide() -> None:
    """After blocks were dropped, the original's matrix of that name may be another's."""
    for bits, symmetric, group in SETTINGS:
        _, weight, rounding = made(bits, symmetric, group)
        assert (rounding.start != rounding.codes()).float().mean() > 0.5
        other = Rounding(weight.spec, dict(weight.tensors), normal(12, 40, seed=9))
        assert torch.equal(other.start, other.codes())


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_stored_is_what_was_trained(setting: tuple[int, bool, int]) -> None:
    _, weight, rounding = made(*setting)
    with torch.no_grad():
        rounding.offset.copy_(normal(12, 40, seed=1, scale=2.0))
        rounding.stretch.copy_(normal(*rounding.stretch.shape, seed=2, scale=0.3))
    stored = rounding.packed(weight).dense()
    torch.testing.assert_close(stored, rounding().detach(), rtol=2e-3, atol=1e-6)  # 16-bit scales
    assert not torch.equal(stored, weight.dense())


def test_gradient_steps_lower_the_loss_and_move_codes() -> None:
    """Towards another matrix: a weight that lies near the border of its cell goes first."""
    W, _, rounding = made(3, True, 16)
    goal = W + normal(12, 40, seed=3, scale=0.02)
    before = rounding.codes().detach().clone()
    optimizer = torch.optim.Adam(rounding.parameters(), lr=0.1)
    losses = []
    for _ in range(200):
        loss = (rounding() - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    moved = rounding.codes().detach() - before
    assert 0 < (moved != 0).float().mean() < 0.6
    best = RTN(bits=3, group=16)(goal).dense()
    assert min(losses) < 2 * (best - goal).square().mean().item()


def test_codes_stay_on_the_grid() -> None:
    _, weight, rounding = made(2, True, 16)
    with torch.no_grad():
        rounding.offset.fill_(100.0)
    assert (rounding.codes() == 1).all()
    assert torch.isfinite(rounding.packed(weight).dense()).all()
