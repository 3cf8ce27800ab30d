"""Losses between the predictions of a teacher and a student, in nats a token."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from compress.objective import IGNORED


def forward_kl(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """T² · KL(teacher ‖ student), both softened by T (Hinton et al. 2015, arXiv 1503.02531).

    Logits [batch, positions, vocabulary]; the mean over positions whose label counts. T² keeps
    the size of the gradient as T changes.
    """
    counted = labels != IGNORED
    p = F.log_softmax(teacher[counted].float() / temperature, dim=-1)
    q = F.log_softmax(student[counted].float() / temperature, dim=-1)
    return (p.exp() * (p - q)).sum(-1).mean() * temperature**2


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """−log q(label), the mean over positions whose label counts."""
    flat = student.float().flatten(0, 1)
    return F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED)
