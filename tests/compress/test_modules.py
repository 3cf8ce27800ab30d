"""Modules that compute their weight from what is stored: same outputs, gradients, dtype, state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.testing import starting_weight
from compress.weights import LowRank, Weight
from compress.weights.modeling_compressed import attach, attach_alias

KINDS = sorted(set(Weight.kinds) - {"dense"})
FLOATING = ("sparse", "lowrank")


def module(layout: str) -> nn.Module:
    """One whose weight is [96, 128] when seen as [out, in]."""
    torch.manual_seed(0)
    if layout == "linear":
        return nn.Linear(128, 96)
    return Conv1D(96, 128) if layout == "conv1d" else nn.Embedding(96, 128)


def inputs(layout: str) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 96, (3, 5)) if layout == "embedding" else torch.randn(3, 5, 128)


def dense(layout: str, matrix: Tensor) -> nn.Module:
    made = module(layout)
    with torch.no_grad():
        made.weight.copy_(matrix.T if layout == "conv1d" else matrix)
    return made


def attached(layout: str, weight: Weight) -> nn.Module:
    tensors = {
        k: t.float() if t.is_floating_point() else t.clone() for k, t in weight.tensors.items()
    }
    made = attach(module(layout), weight.spec, tensors)
    return made.requires_grad_(False)  # a bias in training would keep it from caching


@pytest.mark.parametrize("layout", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_attached_module_computes_what_the_dense_one_does(kind: str, layout: str) -> None:
    weight = starting_weight(kind)
    ours, theirs = attached(layout, weight), dense(layout, weight.dense())
    assert isinstance(ours, type(theirs))
    for _ in range(2):  # the second call reads the matrix that was kept
        torch.testing.assert_close(ours(inputs(layout)), theirs(inputs(layout)))
    torch.testing.assert_close(ours.weight, theirs.weight.data, rtol=1e-5, atol=1e-6)


def test_factors_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pivoted = LowRank.pivoted(torch.randn(96, 24), torch.randn(24, 128), torch.float32)
    ours = attached("linear", pivoted)
    ours(inputs("linear"))
    monkeypatch.setattr("compress.weights.modeling_compressed.decode", None)
    ours(inputs("linear"))
    ours.to(torch.float64)
    with pytest.raises(TypeError, match="not callable"):
        ours(inputs("linear").double())


@pytest.mark.parametrize("kind", KINDS)
def test_casting_follows(kind: str) -> None:
    weight = starting_weight(kind)
    ours = attached("linear", weight)
    before = ours(inputs("linear"))
    ours.to(torch.bfloat16)
    assert ours.weight.dtype == torch.bfloat16
    after = ours(inputs("linear").bfloat16())
    assert after.dtype == torch.bfloat16
    assert (after.float() - before).norm() < 0.02 * before.norm()


@pytest.mark.parametrize("layout", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("kind", FLOATING)
def test_stored_tensors_train(kind: str, layout: str) -> None:
    weight = starting_weight(kind)
    ours = attached(layout, weight)
    zeros = weight.dense() == 0
    stored = {k: t for k, t in ours.tensors().items() if t.is_floating_point()}
    for tensor in stored.values():
        tensor.requires_grad_(True)
    before = {k: t.detach().clone() for k, t in stored.items()}
    optimizer = torch.optim.SGD(stored.values(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = ours(inputs(layout)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    for key, tensor in stored.items():
        assert not torch.equal(tensor, before[key]), key
    if kind == "sparse":
        matrix = ours.weight.detach()
        assert (matrix.T if layout == "conv1d" else matrix)[zeros].eq(0).all()


@pytest.mark.parametrize("kind", FLOATING)
def test_gradients_of_stored_tensors_are_those_of_the_matrix(kind: str) -> None:
    weight = starting_weight(kind)
    ours = attached("linear", weight)
    stored = [t.requires_grad_(True) for t in ours.tensors().values() if t.is_floating_point()]
    ours(inputs("linear")).square().sum().backward()
    step, direction = 1e-3, [torch.sign(t) for t in stored]
    slope = sum((t.grad * d).sum().item() for t, d in zip(stored, direction, strict=True))
    values = []
    for side in (1, -1):
        moved = attached("linear", weight)
        with torch.no_grad():
            floating = (t for t in moved.tensors().values() if t.is_floating_point())
            for tensor, d in zip(floating, direction, strict=True):
                tensor.add_(side * step * d)
            values.append(moved(inputs("linear")).double().square().sum().item())
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip_is_seen_at_once(kind: str) -> None:
    ours = attached("linear", starting_weight(kind))
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for name, tensor in other.tensors().items():
            if tensor.is_floating_point() and name != "quant_map":
                tensor.mul_(0.5)
            if name == "row":  # of entropy-coded integers: eighths of doublings
                tensor.sub_(8)
    assert "weight" not in ours.state_dict()
    x = inputs("linear")
    first = other(x)
    other.load_state_dict(ours.state_dict())
    torch.testing.assert_close(other(x), ours(x))
    assert not torch.allclose(first, ours(x))


def test_an_alias_reads_the_module_it_is_tied_to() -> None:
    weight = starting_weight("quantized")
    table = attached("embedding", weight)
    head = attach_alias(nn.Linear(128, 96, bias=False), table)
    x = torch.randn(2, 128)
    torch.testing.assert_close(head(x), x @ weight.dense().T)
    assert not head.state_dict()
    assert torch.equal(head.weight, table.weight)
