"""Losses of training against loops over positions and classes."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import normal
from torch import Tensor

from compress.compressors.distillation.losses import (
    attention_loss,
    bucketed,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    log_probabilities,
    reverse_kl,
    skewed_kl,
    state_loss,
)

TOKENS, VOCABULARY = 7, 11


def logits(seed: int) -> Tensor:
    return normal(TOKENS, VOCABULARY, seed=seed, scale=2)


def softmax(row: list[float]) -> list[float]:
    exponents = [math.exp(x) for x in row]
    return [e / sum(exponents) for e in exponents]


def slow_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mixture(p: list[float], q: list[float], share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


SLOW = {
    "forward": slow_kl,
    "reverse": lambda p, q: slow_kl(q, p),
    "skewed": lambda p, q: slow_kl(p, mixture(p, q, 0.1)),
    "js": lambda p, q: 0.3 * slow_kl(p, mixture(p, q, 0.3)) + 0.7 * slow_kl(q, mixture(p, q, 0.3)),
}
FAST = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "skewed": lambda p, q: skewed_kl(p, q, 0.1),
    "js": lambda p, q: jensen_shannon(p, q, 0.3),
}


@pytest.mark.parametrize("name", SLOW)
def test_divergences(name: str) -> None:
    teacher, student = logits(0), logits(1)
    expected = [
        SLOW[name](softmax(t.tolist()), softmax(s.tolist()))
        for t, s in zip(teacher, student, strict=True)
    ]
    p, q = log_probabilities(teacher), log_probabilities(student)
    torch.testing.assert_close(FAST[name](p, q), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(FAST[name](p, p), torch.zeros(TOKENS), rtol=0, atol=1e-6)
    assert (FAST[name](p, log_probabilities(100 * student)) >= 0).all()


def test_skewed_and_jensen_shannon_stay_bounded_where_the_student_is_sure_and_wrong() -> None:
    p = log_probabilities(torch.tensor([[200.0, 0.0]]))
    q = log_probabilities(torch.tensor([[0.0, 200.0]]))
    assert forward_kl(p, q).item() == pytest.approx(200)
    assert skewed_kl(p, q, 0.1).item() == pytest.approx(-math.log(0.1))
    assert jensen_shannon(p, q, 0.5).item() == pytest.approx(math.log(2))


def test_cross_entropy() -> None:
    student = logits(1)
    labels = torch.arange(TOKENS) % VOCABULARY
    expected = [-math.log(softmax(s.tolist())[i]) for i, s in enumerate(student)]
    found = cross_entropy(log_probabilities(student), labels)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_buckets_hold_all_probability_and_nothing_twice() -> None:
    x = logits(2)
    ids = torch.tensor([[0, 3], [10, 9], [1, 2], [4, 5], [6, 7], [8, 0], [2, 10]])
    found = bucketed(x, ids).exp()
    for i in range(TOKENS):
        p = softmax(x[i].tolist())
        kept = [p[j] for j in ids[i].tolist()]
        assert found[i].tolist() == pytest.approx([*kept, 1 - sum(kept)], rel=1e-4)
    assert torch.isfinite(bucketed(50 * x, ids)).all()


def test_kl_of_buckets_is_never_larger_and_tends_to_the_whole() -> None:
    teacher, student = logits(3), logits(4)
    whole = forward_kl(log_probabilities(teacher), log_probabilities(student))
    last = torch.zeros(TOKENS)
    for top in range(1, VOCABULARY):
        ids = teacher.topk(top).indices
        found = forward_kl(bucketed(teacher, ids), bucketed(student, ids))
        assert (found <= whole + 1e-5).all()
        assert (found >= last - 1e-5).all()
        last = found
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-5)


def test_state_loss() -> None:
    a, b = normal(2, 3, 8, seed=5, scale=1.0), normal(2, 3, 8, seed=6, scale=4.0)
    for i in range(2):
        for j in range(3):
            x, y = a[i, j].tolist(), b[i, j].tolist()
            m, n = (math.sqrt(sum(v * v for v in z) / 8) for z in (x, y))
            expected = sum((u / m - v / n) ** 2 for u, v in zip(x, y, strict=True)) / 8
            assert state_loss(a, b)[i, j].item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(state_loss(3 * a, a), torch.zeros(2, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(state_loss(-a, a), torch.full((2, 3), 4.0))


def test_attention_loss() -> None:
    a, b = (normal(2, h, 4, 4, seed=h, scale=1.0).softmax(-1) for h in (3, 5))
    found = attention_loss(a, b)
    for i in range(2):
        for query in range(4):
            x = [sum(a[i, h, query, k].item() for h in range(3)) / 3 for k in range(4)]
            y = [sum(b[i, h, query, k].item() for h in range(5)) / 5 for k in range(4)]
            above = sum((u - v) ** 2 for u, v in zip(x, y, strict=True))
            expected = above / sum(v * v for v in y)
            assert found[i, query].item() == pytest.approx(expected, rel=1e-4)


def test_half_precision_logits_are_compared_in_single() -> None:
    full = forward_kl(log_probabilities(logits(0)), log_probabilities(logits(1)))
    half = [log_probabilities(logits(i).bfloat16()) for i in (0, 1)]
    assert forward_kl(*half).dtype == torch.float32
    torch.testing.assert_close(forward_kl(*half), full, rtol=0.1, atol=0.05)
