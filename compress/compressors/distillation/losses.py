"""Losses between the predictions, states and attention of a teacher and a student.

Divergences take log-probabilities [tokens, classes], p of the teacher and q of the student, and
return nats [tokens]. Classes are the vocabulary, or what a cache keeps of it (``bucketed``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p (log p − log q): the student covers what the teacher holds possible."""
    return (p.exp() * (p - q)).sum(-1)


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(q ‖ p): the student avoids what the teacher does (MiniLLM, arXiv 2306.08543)."""
    return forward_kl(q, p)


def skewed_kl(p: Tensor, q: Tensor, skew: float) -> Tensor:
    """KL(p ‖ skew·p + (1 − skew)·q): bounded where q vanishes (DistiLLM, arXiv 2402.03898)."""
    return forward_kl(p, mixed(p, q, skew))


def jensen_shannon(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """β·KL(p ‖ m) + (1 − β)·KL(q ‖ m), m = β·p + (1 − β)·q (GKD, arXiv 2306.13649)."""
    m = mixed(p, q, beta)
    return beta * forward_kl(p, m) + (1 - beta) * forward_kl(q, m)


def cross_entropy(q: Tensor, labels: Tensor) -> Tensor:
    """−log q(label); labels int64 [tokens]."""
    return -q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def mixed(p: Tensor, q: Tensor, share: float) -> Tensor:
    """log(share·p + (1 − share)·q), 0 < share < 1."""
    return torch.logaddexp(p + math.log(share), q + math.log1p(-share))


def log_probabilities(logits: Tensor) -> Tensor:
    """float32 [tokens, vocabulary]."""
    return logits.float().log_softmax(-1)


def bucketed(logits: Tensor, ids: Tensor) -> Tensor:
    """log-probabilities of ``ids`` [tokens, k], and of all others together: [tokens, k + 1].

    Nothing is renormalised: the k + 1 classes hold all probability, so a divergence between them
    is never larger than the one between whole vocabularies.
    """
    logits = logits.float()
    others = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    classes = torch.cat((logits.gather(-1, ids), others), -1)
    return classes - logits.logsumexp(-1, keepdim=True)


def state_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of states [..., width], each scaled to unit root mean square.

    Between 0 and 4; returns [...].
    """
    return (_unit(student) - _unit(teacher)).square().mean(-1)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """‖a − b‖²/‖b‖² of attention [batch, heads, queries, keys], averaged over heads first.

    Heads of one model are not those of another, and there may be fewer. Returns [batch, queries].
    """
    a, b = student.float().mean(1), teacher.float().mean(1)
    return (a - b).square().sum(-1) / b.square().sum(-1).clamp_min(1e-12)


def _unit(states: Tensor) -> Tensor:
    states = states.float()
    return states * (states.square().mean(-1, keepdim=True) + 1e-12).rsqrt()
