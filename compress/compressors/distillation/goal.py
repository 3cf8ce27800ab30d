"""What distillation lowers: predictions of teacher and student, piece by piece, and features."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress.compressors.distillation.features import Features
from compress.compressors.distillation.losses import (
    cross_entropy,
    forward_kl,
    log_probabilities,
)
from compress.compressors.distillation.policy import continued
from compress.compressors.distillation.predictor import Batch, Predictor
from compress.compressors.distillation.teacher import PIECE, Online, Teacher, read
from compress.objective import IGNORED, Examples
from compress.training import Objective

Divergence = Callable[[Tensor, Tensor], Tensor]


class Distillation(Objective):
    """kl_share · T²·divergence + (1 − kl_share) · cross-entropy + features, over the whole text.

    The held-out loss is KL(teacher ‖ student) at temperature 1, whatever is trained on. A share
    ``on_policy`` of the steps reads the first half of its windows alone, and the student writes
    the rest; these have no right next token, so that cross-entropy is left out of them.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        text: Examples,
        *,
        divergence: Divergence = forward_kl,
        temperature: float = 1.0,
        kl_share: float = 1.0,
        features: Features | None = None,
        on_policy: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student, self.features = student, features
        self.teacher = teacher  # no submodule: it is neither trained nor shared out
        self.text, self.divergence = text, divergence
        self.temperature, self.kl_share = temperature, kl_share
        self.on_policy, self.seed = on_policy, seed
        self.predictor = Predictor(student, read(text, torch.tensor([0]), _device(student)))

    def forward(self, rows: Tensor, step: int | None) -> Tensor:
        batch = self._batch(rows, step)
        asked = self.features.asked if self.features and step is not None else {}
        states, output = self.predictor.run(batch, **asked)
        counted = batch.labels != IGNORED
        x, labels, known = states[counted], batch.labels[counted], self.teacher.fetch(batch, rows)
        total = x.new_zeros((), dtype=torch.float32)
        pieces = max(1, math.ceil(len(x) * self._vocabulary / PIECE))
        for piece in torch.arange(len(x), device=x.device).tensor_split(pieces):
            given = (x[piece], labels[piece], self._writes(step), step is None)
            facts = tuple(tensor[piece] for tensor in known)
            if pieces == 1 or not torch.is_grad_enabled():
                total = total + self._loss(*given, *facts)
            else:  # logits are made again for the gradient, rather than kept
                total = total + checkpoint(self._loss, *given, *facts, use_reentrant=False)
        if asked:
            assert self.features is not None
            assert isinstance(self.teacher, Online)
            total = total + self.features(output, self.teacher.output, counted)
        return total

    def count(self, rows: Tensor, step: int | None) -> int:
        assert self.text.targets is not None
        targets = self.text.targets[rows]
        if self._writes(step):
            return len(rows) * (targets.shape[1] - targets.shape[1] // 2)
        return int((targets != IGNORED).sum())

    def _loss(self, x: Tensor, labels: Tensor, written: bool, held: bool, *known: Tensor) -> Tensor:
        logits = self.predictor.logits(x)
        if held:
            return forward_kl(*self.teacher.compare(logits, 1.0, *known)).sum()
        total = x.new_zeros((), dtype=torch.float32)
        if self.kl_share > 0:
            p, q = self.teacher.compare(logits, self.temperature, *known)
            total = total + self.kl_share * self.temperature**2 * self.divergence(p, q).sum()
        if self.kl_share < 1 and not written:
            entropy = cross_entropy(log_probabilities(logits), labels).sum()
            total = total + (1 - self.kl_share) * entropy
        return total

    def _writes(self, step: int | None) -> bool:
        """Whether the student writes the text of this step."""
        if step is None or not self.on_policy:
            return False
        return random.Random(self.seed * 1_000_003 + step).random() < self.on_policy

    def _batch(self, rows: Tensor, step: int | None) -> Batch:
        batch = read(self.text, rows, _device(self.student))
        if not self._writes(step):
            return batch
        tokens = batch.inputs["input_ids"]
        length, half = tokens.shape[1], tokens.shape[1] // 2
        seeds = [(self.seed * 1_000_003 + (step or 0)) * 1_000_003 + row for row in rows.tolist()]
        tokens = continued(self.predictor, tokens[:, :half], length, seeds)
        labels = torch.full_like(tokens, IGNORED)
        labels[:, half - 1 : -1] = tokens[:, half:]
        return Batch({"input_ids": tokens}, labels, batch.options)

    @property
    def _vocabulary(self) -> int:
        return int(self.predictor.model.config.get_text_config().vocab_size)


def _device(model: nn.Module) -> Any:
    return next(model.parameters()).device
