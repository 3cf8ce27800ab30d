"""Round to nearest, on the best grid."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from compress.compressors.base import LayerCompressor, Shape
from compress.compressors.quantization.grid import search_grid
from compress.problem import LayerProblem
from compress.weights import Quantized
from compress.weights.quantized import scale_dtype


class RTN(LayerCompressor):
    """Round each weight to the nearest point of a grid whose error is least (see grid.py).

    ŵ = s·(clip(round(w/s) + z, 0, 2^b − 1) − z), one scale s and zero-point z per group of inputs
    of a row, searched to minimise ‖W − Ŵ‖² (after NeUQI, arXiv 2505.17595; min-max scales are the
    starting point of that search). Stored packed, b bits a weight plus 16 (+ b) a group.
    """

    family: ClassVar = "quantization"
    headline: ClassVar = ("bits", "group")
    accepts: ClassVar = frozenset({"dense", "sparse", "lowrank"})
    makes: ClassVar = "quantized"

    bits: int = Field(4, ge=2, le=8, description="bits a weight")
    group: int | Literal["channel"] = Field(
        64, description='inputs that share a scale: a number from 8, or "channel" for a whole row'
    )
    symmetric: bool = Field(
        True, description="no zero-point; the scale's sign turns the grid to the longer tail"
    )

    def model_post_init(self, context: object) -> None:
        if isinstance(self.group, int) and self.group < 8:
            raise ValueError(f"group {self.group} is below 8; scales would outweigh the codes")

    def solve(self, problem: LayerProblem) -> Quantized:
        W = problem.W
        group = W.shape[1] if self.group == "channel" else self.group
        dtype = scale_dtype(problem.dtype)
        grid = search_grid(
            W, problem.H_diag, bits=self.bits, group=group, symmetric=self.symmetric, dtype=dtype
        )
        zero = None if self.symmetric else grid.zero
        return Quantized.pack(
            grid.codes(W), grid.scale, zero, bits=self.bits, group=grid.group, dtype=problem.dtype
        )

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        rows, columns = shape
        groups = 1 if self.group == "channel" else -(-columns // self.group)
        zeros = 0 if self.symmetric else -(-rows * self.bits // 32) * 4 * groups
        return rows * (-(-columns * self.bits // 32) * 4 + 2 * groups) + zeros + 16
