"""Healing of a packed quantized model: its grids move, its codes follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from compress.anatomy import Site
from compress.compressors.base import TrainingRun
from compress.compressors.distillation.recovery import Recovery, vectors
from compress.compressors.quantization.rounding import Rounding, install, matrix, repacked
from compress.weights import Weight

BEYOND = (0.5, 0.75, 1.0)  # steps: how far a code must be from its weight to be rounded anew


class TuneScales(Recovery):
    """Train scales, zero-points, norms and biases of a quantized model; then round codes again.

    ŵ = s(1 + r)·(q − round(z + y)) with r and y trained by KL(teacher ‖ student) of the whole
    model and the codes q as they were (EfficientQAT's second phase, arXiv 2407.11062, here with
    zero-points and vectors). Afterwards codes that the moved grid left far from the original
    weights are rounded to it, if that lowers the held-out loss. Bytes and format stay.
    """

    accepts: ClassVar = frozenset({"quantized"})
    layouts: ClassVar = frozenset({"linear", "conv1d", "embedding"})

    steps: int = Field(200, ge=1, description="optimizer steps")
    learning_rate: float = Field(
        2e-2, gt=0, description="highest learning rate; scales take a fifth of it, of their size"
    )
    kl_share: float = Field(1.0, ge=0, le=1, description="weight of KL; cross-entropy has the rest")
    norms: bool = Field(True, description="train norms, biases and other vectors as well")
    reround: bool = Field(True, description="round codes to the tuned grid where it helps")

    def trained(self, run: TrainingRun) -> list[Tensor]:
        chosen = vectors(run) if self.norms else []
        for name in sorted(run.sites):
            chosen += install(run, name, None, ("scales", "zeros")).parameters()
        return chosen

    def polish(self, run: TrainingRun, check: Callable[[], float]) -> dict[str, Any]:
        """Round codes anew; the best of several distances, or none, by held-out loss."""
        if not self.reround:
            return {}
        original = run.original()
        grids = {name: _grid(run, name) for name in sorted(run.sites)}
        now = {name: grid.codes() for name, grid in grids.items()}
        best, chosen = check(), now
        for beyond in BEYOND:
            tried = dict(now)
            for name, grid in grids.items():
                W = matrix(original, name)
                if W is not None and W.shape == now[name].shape:
                    tried[name] = grid.nearer(now[name], W.to(now[name].device), beyond)
            _put(grids, tried)
            loss = check()
            if loss < best:
                best, chosen = loss, tried
        _put(grids, chosen)
        moved = sum(int((chosen[name] != now[name]).sum()) for name in grids)
        return {"rounded_anew": moved, "held_out_loss_rounded": round(best, 6)}

    def finish(self, module: nn.Module, site: Site, weight: Weight) -> Weight:
        return repacked(module, weight)


def _grid(run: TrainingRun, name: str) -> Rounding:
    rounding = run.student.get_submodule(name).get_submodule("rounding")
    assert isinstance(rounding, Rounding)
    return rounding


def _put(grids: dict[str, Rounding], codes: dict[str, Tensor]) -> None:
    for name, grid in grids.items():
        grid.start = codes[name]
