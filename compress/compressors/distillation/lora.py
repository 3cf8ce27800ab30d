"""Recovery with low-rank adapters on a frozen compressed model."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from compress.anatomy import Site
from compress.compressors.base import TrainingRun
from compress.compressors.distillation.recovery import Recovery
from compress.weights import Dense, LowRank, Sum, Weight


class LoRA(Recovery):
    """Freeze the model and train W + (α/r)·B·A (LoRA, arXiv 2106.09685; QLoRA, 2305.14314).

    Trained with peft to predict as the original does, like ``distill``. Afterwards the update is
    merged into dense weights; packed, sparse and low-rank ones keep it beside them, as a PEFT
    adapter in the checkpoint, because merging would undo what they are.
    """

    layouts: ClassVar = frozenset({"linear", "conv1d"})

    learning_rate: float | None = Field(1e-3, gt=0, description="highest learning rate")
    rank: int = Field(16, ge=1, description="rank of every update")
    alpha: float = Field(32.0, gt=0, description="scale of the update, divided by the rank")

    def result(self, kind: str) -> str:
        return "dense" if kind == "dense" else "sum"

    def trained(self, run: TrainingRun) -> list[Tensor]:
        from peft import LoraConfig, inject_adapter_in_model  # a second of imports

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # a number, whatever the hint says
            target_modules=list(run.sites),
            lora_dropout=0.0,
            bias="none",
        )
        inject_adapter_in_model(config, run.student)
        chosen: list[Tensor] = [p for name, p in run.student.named_parameters() if "lora_" in name]
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen

    def finish(self, module: nn.Module, site: Site, weight: Weight) -> Weight:
        A = module.get_parameter("lora_A.default.weight").detach().float().cpu()
        B = module.get_parameter("lora_B.default.weight").detach().float().cpu()
        B = B * (self.alpha / self.rank)
        if isinstance(weight, Dense):
            return Dense.of(weight.dense() + B @ A, weight.dtype)
        terms = weight.terms if isinstance(weight, Sum) else [weight]
        return Sum.of(*terms, LowRank.of(B, A, weight.dtype))
