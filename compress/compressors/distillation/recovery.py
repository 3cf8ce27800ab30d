"""What distillation and LoRA share: training the student to predict as the original does."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.compressors.base import TrainingCompressor, TrainingRun
from compress.compressors.distillation.losses import cross_entropy, forward_kl
from compress.objective import examples
from compress.training import Schedule, fit


class Recovery(TrainingCompressor):
    """loss = kl_share · T²·KL(teacher_T ‖ student_T) + (1 − kl_share) · cross-entropy.

    Methods differ in what they train. The best step by KL on held-out text is kept.
    """

    family: ClassVar = "distillation"
    headline: ClassVar = ("steps",)

    steps: int = Field(300, ge=1, description="optimizer steps")
    learning_rate: float = Field(1e-3, gt=0, description="highest learning rate")
    batch: int = Field(8, ge=1, description="windows a step")
    length: int = Field(256, ge=8, description="tokens in a window")
    samples: int = Field(1024, ge=2, description="windows of text; an eighth is held out")
    temperature: float = Field(1.0, gt=0, description="softening of both predictions")
    kl_share: float = Field(0.9, ge=0, le=1, description="weight of KL; cross-entropy has the rest")
    patience: int = Field(6, ge=1, description="checks without improvement that end the run")

    @abstractmethod
    def trained(self, run: TrainingRun) -> list[Tensor]:
        """The parameters to train; all others are frozen."""

    def tokens(self) -> tuple[int, int]:
        return self.samples, self.length

    def train(self, run: TrainingRun) -> dict[str, Any]:
        run.student.requires_grad_(False)
        trained = self.trained(run)
        teacher = run.teacher()
        text = examples(
            run.student, run.text.tokens, run.text.token_bytes, run.tokenizer, seed=run.seed
        )
        windows = torch.arange(len(text))

        def predictions(model: nn.Module, rows: Tensor) -> Tensor:
            return text.call(model, rows).logits

        def wanted(rows: Tensor) -> Tensor:
            with torch.no_grad():
                return predictions(teacher, rows)

        def targets(rows: Tensor) -> Tensor:
            assert text.targets is not None
            return text.targets[rows]

        def loss(student: nn.Module, rows: Tensor) -> Tensor:
            ours = predictions(student, rows)
            labels = targets(rows).to(ours.device)
            value = torch.zeros((), device=ours.device)
            if self.kl_share > 0:
                value = self.kl_share * forward_kl(ours, wanted(rows), labels, self.temperature)
            if self.kl_share < 1:
                value = value + (1 - self.kl_share) * cross_entropy(ours, labels)
            return value

        def held_loss(student: nn.Module, rows: Tensor) -> Tensor:
            ours = predictions(student, rows)
            return forward_kl(ours, wanted(rows), targets(rows).to(ours.device))

        schedule = Schedule(self.steps, self.learning_rate, self.batch, patience=self.patience)
        return fit(
            run.student,
            trained,
            loss,
            held_loss,
            train=windows[: -run.held],
            held=windows[-run.held :],
            schedule=schedule,
            seed=run.seed,
            folder=run.folder,
            report=run.report,
        )
