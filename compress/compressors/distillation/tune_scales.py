"""Healing of a packed quantized model: its grids move, then its codes on them."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from compress.anatomy import Site
from compress.compressors.base import TrainingRun
from compress.compressors.distillation.recovery import Recovery, vectors
from compress.compressors.quantization.rounding import Rounding, install, repacked
from compress.weights import Weight


class TuneScales(Recovery):
    """Train scales, zero-points, norms and biases of a quantized model; then round codes again.

    ŵ = s(1 + r)·(q − round(z + y)) with r and y trained by KL(teacher ‖ student) of the whole
    model and the codes q as they were (EfficientQAT's second phase, arXiv 2407.11062, here with
    zero-points and vectors). After a tenth of the steps codes are rounded anew to the moving grid,
    by gradients as in ``autoround``, and stay so where the held-out loss is lower. The learning
    rate ends at zero, so that codes between two points stop going to and fro. Bytes and format
    stay.
    """

    accepts: ClassVar = frozenset({"quantized"})
    layouts: ClassVar = frozenset({"linear", "conv1d", "embedding"})

    steps: int = Field(240, ge=1, description="optimizer steps")
    learning_rate: float = Field(
        1e-2, gt=0, description="highest learning rate; scales take a fifth of it, of their size"
    )
    floor: float = Field(
        0.0, ge=0, le=1, description="share of the learning rate that is left at the last step"
    )
    kl_share: float = Field(1.0, ge=0, le=1, description="weight of KL; cross-entropy has the rest")
    norms: bool = Field(True, description="train norms, biases and other vectors as well")
    reround: bool = Field(True, description="round codes anew to the tuned grid")

    def trained(self, run: TrainingRun) -> list[Tensor]:
        chosen = vectors(run) if self.norms else []
        original = run.original() if self.reround else None
        parts = ("codes", "scales", "zeros") if self.reround else ("scales", "zeros")
        for name in sorted(run.sites):
            chosen += install(run, name, original, parts).parameters()
        return chosen

    def later(self, name: str) -> bool:
        return name.endswith("rounding.offset")

    def told(self, run: TrainingRun) -> dict[str, Any]:
        grids = [run.student.get_submodule(name).get_submodule("rounding") for name in run.sites]
        return {"codes_changed": sum(g.changed() for g in grids if isinstance(g, Rounding))}

    def finish(self, module: nn.Module, site: Site, weight: Weight) -> Weight:
        return repacked(module, weight)
