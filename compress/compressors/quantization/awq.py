"""Scales that protect the inputs that matter most, searched by the layer's own error."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.compressors.base import ScalingCompressor, SharedInput
from compress.compressors.quantization.rtn import RTN
from compress.problem import LayerProblem, relative_error
from compress.weights import Dense


class AWQ(ScalingCompressor):
    """Scale up the columns of large inputs before rounding (AWQ, arXiv 2306.00978).

    s_j = x_j^α, or s_j = x_j^α / w_j^(1−α), where x is the mean |x| and w the root mean square of
    the columns; divided by √(max s · min s). Form and α in [0, 1] are those with the least
    Σ tr(D H Dᵀ) / tr(W H Wᵀ), D = Q(W·diag(s))·diag(s)⁻¹ − W, over all matrices that read x;
    s = 1 is among them. Q rounds to nearest as the stage after this one should: give both the
    same numbers.
    """

    bits: int = Field(4, ge=2, le=8, description="bits a weight that the scales are chosen for")
    group: int | Literal["channel"] = Field(
        64, description='inputs that will share a grid: a number from 8, or "channel"'
    )
    symmetric: bool = Field(True, description="whether that grid has no zero-point")
    steps: int = Field(10, ge=1, description="how many α are tried in either form")

    def model_post_init(self, context: object) -> None:
        RTN(bits=self.bits, group=self.group, symmetric=self.symmetric)

    def scale(self, inputs: SharedInput) -> Tensor:
        best = torch.ones_like(inputs.mean)
        least = self._error(inputs, best)
        columns = torch.cat(inputs.matrices).square().mean(0).sqrt()
        for step in range(self.steps + 1):
            alpha = step / self.steps
            x = bounded(inputs.mean) ** alpha
            for candidate in (x, x / bounded(columns) ** (1 - alpha)):
                scale = candidate / (candidate.max() * candidate.min()).sqrt()
                error = self._error(inputs, scale)
                if error < least:
                    best, least = scale, error
        return best

    def _error(self, inputs: SharedInput, scale: Tensor) -> float:
        """The relative errors of all matrices together."""
        solver = RTN(bits=self.bits, group=self.group, symmetric=self.symmetric)
        total = 0.0
        for W in inputs.matrices:
            scaled = W * scale
            grid = solver.grid(scaled, LayerProblem.of(scaled))
            rounded = Dense.of(grid.values(grid.codes(scaled)) / scale)
            total += relative_error(LayerProblem.of(W, inputs.H), rounded)
        return total


def bounded(size: Tensor) -> Tensor:
    """Sizes [in], of which none counts as less than 1e-4 of the largest; 1 where all are zero."""
    most = size.max().item()
    return size.clamp(min=1e-4 * most) if most > 0 else torch.ones_like(size)
