"""Scales that protect the inputs that matter most, searched by the layer's own error."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.compressors.base import ScalingCompressor, SharedInput
from compress.compressors.quantization.rtn import RTN
from compress.problem import LayerProblem


class AWQ(ScalingCompressor):
    """Scale up the columns of large inputs before rounding (AWQ, arXiv 2306.00978).

    s_j = (mean |x_j|)^α, divided by √(max s · min s). α in [0, 1] is the one with the least
    Σ tr(D H Dᵀ), D = Q(W·diag(s))·diag(s)⁻¹ − W, over all matrices that read x; α = 0 changes
    nothing. Q rounds to nearest as the stage after this one should: give both the same numbers.
    """

    bits: int = Field(4, ge=2, le=8, description="bits a weight that the scales are chosen for")
    group: int | Literal["channel"] = Field(
        64, description='inputs that will share a grid: a number from 8, or "channel"'
    )
    symmetric: bool = Field(True, description="whether that grid has no zero-point")
    steps: int = Field(20, ge=1, description="how many α above 0 are tried")

    def model_post_init(self, context: object) -> None:
        RTN(bits=self.bits, group=self.group, symmetric=self.symmetric)

    def scale(self, inputs: SharedInput) -> Tensor:
        best = torch.ones_like(inputs.mean)
        least = self._error(inputs, best)
        for alpha in torch.linspace(0, 1, self.steps + 1)[1:].tolist():
            scale = powers(inputs.mean, alpha)
            error = self._error(inputs, scale)
            if error < least:
                best, least = scale, error
        return best

    def _error(self, inputs: SharedInput, scale: Tensor) -> float:
        solver = RTN(bits=self.bits, group=self.group, symmetric=self.symmetric)
        error = 0.0
        for W in inputs.matrices:
            scaled = W * scale
            grid = solver.grid(scaled, LayerProblem.of(scaled))
            D = grid.values(grid.codes(scaled)) / scale - W
            error += ((D @ inputs.H) * D).sum(dtype=torch.float64).item()
        return error


def powers(size: Tensor, alpha: float) -> Tensor:
    """size^α [in] about 1: inputs that are never seen, or very small, count as 1e-4 of the rest."""
    if not size.max() > 0:
        return torch.ones_like(size)
    scale = size.clamp(min=1e-4 * size.max().item()) ** alpha
    return scale / (scale.max() * scale.min()).sqrt()
