"""Rounding learned by gradient steps, from a quantized model on."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from compress.anatomy import Site
from compress.compressors.base import TrainingRun
from compress.compressors.distillation.recovery import Recovery
from compress.compressors.quantization.rounding import install, repacked
from compress.weights import Weight


class AutoRound(Recovery):
    """Learn which way each weight is rounded, and its scale, so that the model predicts as before.

    ŵ = s(1 + r)·(clip(round(u + v)) − z): codes u are where an earlier stage put them, v and r are
    trained through the rounding as if it were not there (AutoRound, arXiv 2309.05516), but on the
    whole model's KL to the original instead of one block's output, and from gptq's codes. Bytes
    and format stay as they are.
    """

    family: ClassVar = "quantization"
    accepts: ClassVar = frozenset({"quantized"})
    layouts: ClassVar = frozenset({"linear", "conv1d", "embedding"})

    steps: int = Field(200, ge=1, description="optimizer steps")
    learning_rate: float = Field(
        5e-3, gt=0, description="highest learning rate, in steps of a 2-bit grid; finer grids less"
    )
    samples: int = Field(
        128, ge=2, description="windows of text; an eighth, 128 at most, is held out"
    )
    kl_share: float = Field(1.0, ge=0, le=1, description="weight of KL; cross-entropy has the rest")

    def trained(self, run: TrainingRun) -> list[Tensor]:
        original = run.original()
        chosen: list[Tensor] = []
        for name in sorted(run.sites):
            rounding = install(run, name, original, ("codes", "scales"))
            chosen += rounding.parameters()
        return chosen

    def finish(self, module: nn.Module, site: Site, weight: Weight) -> Weight:
        return repacked(module, weight)
