"""Losses of training against loops over positions."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import normal
from torch import Tensor

from compress.compressors.distillation.losses import cross_entropy, forward_kl
from compress.objective import IGNORED


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits [3, 5, 11], labels [3, 5] of which some do not count."""
    labels = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))
    labels[0, 1] = labels[2, :3] = IGNORED
    return normal(3, 5, 11, scale=2), normal(3, 5, 11, seed=1, scale=2), labels


def softmax(logits: list[float]) -> list[float]:
    exponents = [math.exp(x) for x in logits]
    return [e / sum(exponents) for e in exponents]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_forward_kl(temperature: float) -> None:
    student, teacher, labels = batch()
    terms = []
    for i in range(3):
        for j in range(5):
            if labels[i, j] != IGNORED:
                p = softmax((teacher[i, j] / temperature).tolist())
                q = softmax((student[i, j] / temperature).tolist())
                terms.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    expected = temperature**2 * sum(terms) / len(terms)
    found = forward_kl(student, teacher, labels, temperature).item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert forward_kl(teacher, teacher, labels, temperature).item() == pytest.approx(0, abs=1e-6)


def test_cross_entropy() -> None:
    student, _, labels = batch()
    terms = [
        -math.log(softmax(student[i, j].tolist())[int(labels[i, j])])
        for i in range(3)
        for j in range(5)
        if labels[i, j] != IGNORED
    ]
    assert cross_entropy(student, labels).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_gradients_keep_their_size_when_predictions_are_softened() -> None:
    sizes = []
    for temperature in (1.0, 8.0, 16.0):
        student, teacher, labels = batch()
        student.requires_grad_(True)
        forward_kl(student, teacher, labels, temperature).backward()
        assert student.grad is not None
        assert (student.grad[0, 1] == 0).all()
        sizes.append(student.grad.norm().item())
    assert max(sizes) < 4 * min(sizes)
    assert sizes[2] == pytest.approx(sizes[1], rel=0.15)


def test_half_precision_logits_are_compared_in_single() -> None:
    student, teacher, labels = batch()
    full = forward_kl(student, teacher, labels)
    half = forward_kl(student.bfloat16(), teacher.bfloat16(), labels)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.05)
