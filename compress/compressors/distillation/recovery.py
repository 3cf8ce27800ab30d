"""What distillation, LoRA and learned grids share: training to predict as a teacher does."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from compress import distributed
from compress.compressors.base import TrainingCompressor, TrainingRun
from compress.compressors.distillation.features import Features
from compress.compressors.distillation.goal import Distillation, Divergence
from compress.compressors.distillation.losses import (
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_kl,
)
from compress.compressors.distillation.teacher import Cached, Online, Teacher, read
from compress.errors import ModelError
from compress.objective import Examples, examples, family
from compress.training import Keep, Precision, Schedule, Trainer

RATE, WIDTH = 1e-3, 128  # a learning rate, and the hidden width at which it did well


class Recovery(TrainingCompressor):
    """loss = kl_share · T²·D(teacher_T, student_T) + (1 − kl_share) · cross-entropy + features.

    D is one of several divergences. Methods differ in what they train. The best step by
    KL(teacher ‖ student) on held-out text is kept; where much cross-entropy is asked for, which
    leads away from the teacher, the last step may be the better one (``keep``).
    """

    family: ClassVar = "distillation"
    headline: ClassVar = ("steps",)

    steps: int = Field(300, ge=1, description="optimizer steps")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="highest learning rate; if none is said 0.001, less if wider than 128",
    )
    batch: int = Field(8, ge=1, description="windows a step, of all processes together")
    length: int = Field(256, ge=8, description="tokens in a window")
    samples: int = Field(
        1024, ge=2, description="windows of text; an eighth, 128 at most, is held out"
    )
    loss: Literal["forward", "reverse", "skewed", "js"] = Field(
        "forward", description="divergence: KL(teacher ‖ student), reverse, skewed, Jensen-Shannon"
    )
    skew: float = Field(0.1, gt=0, lt=1, description="share of the teacher in a skewed mixture")
    beta: float = Field(0.5, gt=0, lt=1, description="share of the teacher in Jensen-Shannon's")
    temperature: float = Field(1.0, gt=0, description="softening of both predictions")
    kl_share: float = Field(0.9, ge=0, le=1, description="weight of KL; cross-entropy has the rest")
    hidden: float = Field(0.0, ge=0, description="weight of the difference of hidden states")
    attention: float = Field(0.0, ge=0, description="weight of the difference of attention")
    layers: list[int] | None = Field(
        None, description="the teacher's layer that each layer follows in these; evenly spread"
    )
    on_policy: float = Field(
        0.0, ge=0, le=1, description="share of steps on text that the student continues itself"
    )
    cache: int | None = Field(
        None, ge=1, description="keep this many of the teacher's likeliest tokens on disk, not it"
    )
    accumulate: int = Field(1, ge=1, description="pieces that a step is computed in")
    recompute: bool = Field(
        False, description="gradient checkpointing: compute blocks twice, to hold less"
    )
    precision: Precision = Field(
        "auto", description="of the computation; auto is bfloat16 where the device is made for it"
    )
    warmup: float = Field(0.05, ge=0, le=1, description="share of steps until the highest rate")
    floor: float = Field(
        0.1, ge=0, le=1, description="share of the learning rate that is left at the last step"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    patience: int = Field(6, ge=1, description="checks without improvement that end the run")
    keep: Keep = Field(
        "best", description="the step of the least held-out KL, or the last, then always reached"
    )

    @model_validator(mode="after")
    def _what_a_cache_holds(self) -> Recovery:
        if self.cache and (self.hidden or self.attention or self.on_policy):
            raise ValueError(
                "cache holds what the teacher predicts of the text, not its states nor what it "
                "would say to other text: leave out cache, or hidden, attention and on_policy"
            )
        return self

    @abstractmethod
    def trained(self, run: TrainingRun) -> list[Tensor]:
        """The parameters to train; all others are frozen."""

    def later(self, name: str) -> bool:
        """Whether a trained parameter of this name moves only after others have settled."""
        return False

    def matrices(self, run: TrainingRun) -> frozenset[str]:
        """Names of trained parameters of the student that Muon moves, and not AdamW."""
        return frozenset()

    def told(self, run: TrainingRun) -> dict[str, Any]:
        """What else the record says of the trained student."""
        return {}

    def rate(self, model: Any) -> float:
        """The highest learning rate: a wider model needs a lower one (μP, arXiv 2203.03466)."""
        if self.learning_rate is not None:
            return self.learning_rate
        width = getattr(model.config.get_text_config(), "hidden_size", None) or WIDTH
        return RATE * min(1.0, WIDTH / width)

    def tokens(self) -> tuple[int, int]:
        return self.samples, self.length

    def disk(self) -> int:
        """Of a cached token: 6 bytes for each of the likeliest, 4 for all others."""
        return self.samples * self.length * (6 * self.cache + 4) if self.cache else 0

    def divergence(self) -> Divergence:
        known: dict[str, Divergence] = {
            "forward": forward_kl,
            "reverse": reverse_kl,
            "skewed": partial(skewed_kl, skew=self.skew),
            "js": partial(jensen_shannon, beta=self.beta),
        }
        return known[self.loss]

    def train(self, run: TrainingRun) -> dict[str, Any]:
        if self.on_policy and family(run.student) != "causal":
            raise ModelError("on_policy: only models that continue text can write it")
        run.student.requires_grad_(False)
        for parameter in self.trained(run):
            parameter.requires_grad_(True)
        text = examples(
            run.student, run.text.tokens, run.text.token_bytes, run.tokenizer, seed=run.seed
        )
        teacher, features = self._teacher(run, text)
        objective = Distillation(
            run.student,
            teacher,
            text,
            divergence=self.divergence(),
            temperature=self.temperature,
            kl_share=self.kl_share,
            features=features,
            on_policy=self.on_policy,
            seed=run.seed,
        )
        if self.recompute:
            _recompute(run.student)
        matrices = self.matrices(run)
        trainer = Trainer(
            objective,
            Schedule(
                self.steps,
                self.rate(run.student),
                self.batch,
                self.accumulate,
                self.warmup,
                check_every=max(25, self.steps // 20),
                weight_decay=self.weight_decay,
                floor=self.floor,
                patience=self.patience,
                keep=self.keep,
            ),
            seed=run.seed,
            folder=run.folder,
            report=run.report,
            precision=self.precision,
            length=run.text.tokens.shape[1],
            later=self.later,
            matrix=lambda name: name.partition("student.")[2] in matrices,
        )
        windows = torch.arange(len(text))
        summary = trainer.fit(windows[: -run.held], windows[-run.held :])
        trainer.release()
        summary |= {"learning_rate": self.rate(run.student)} | self.told(run)
        return summary

    def _teacher(self, run: TrainingRun, text: Examples) -> tuple[Teacher, Features | None]:
        """Who is learnt from, and what of it beside its predictions."""
        first = torch.tensor([0])
        if self.cache:
            soft, plain = [self.temperature] * (len(text) - run.held), [1.0] * run.held
            key = Cached.key(run.teacher_hash, text, self.cache, soft + plain)
            cached = Cached(run.cache / key, text, soft + plain)
            if cached.missing():
                model = _onto_device(run.teacher())
                online = Online(model, read(text, first, model.device))
                cached.fill(online, self.cache, lambda done, todo: run.report(done, todo, {}))
            distributed.wait()
            return cached, None
        model = _onto_device(run.teacher())
        online = Online(model, read(text, first, model.device))
        if not (self.hidden or self.attention):
            return online, None
        features = Features(
            run.student, model,
            hidden=self.hidden, attention=self.attention, layers=self.layers, seed=run.seed,
        )  # fmt: skip
        online.features = features.asked
        return online, features


def vectors(run: TrainingRun) -> list[Tensor]:
    """Norms, biases and other vectors of the student that are no part of a stored matrix."""
    found: list[Tensor] = []
    for name, parameter in run.student.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if parameter.ndim == 1 and parameter.numel() and (leaf == "bias" or owner not in run.all):
            found.append(parameter)
    return found


def _onto_device(model: Any) -> Any:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.requires_grad_(False).to(device)


def _recompute(model: nn.Module) -> None:
    """Blocks keep what they read and run again for the gradient.

    Not transformers' own switch: that works in training mode alone, which would bring dropout.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            forward: Any = partial(checkpoint, module.forward, use_reentrant=False)
            module.forward = forward
