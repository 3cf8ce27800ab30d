"""What all methods that end in packed integers share: the grid's parameters, and its bytes."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.compressors.base import LayerCompressor, Shape
from compress.compressors.quantization.grid import Grid, search_grid
from compress.problem import LayerProblem
from compress.weights import Quantized
from compress.weights.quantized import scale_dtype


class PackedIntegers(LayerCompressor, ABC):
    """Weights on a grid of 2^bits points, one scale (and zero-point) per group of inputs."""

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

    def grid(self, W: Tensor, problem: LayerProblem) -> Grid:
        """The best grid for W [out, in] by the problem's input importance."""
        group = W.shape[1] if self.group == "channel" else self.group
        dtype = scale_dtype(problem.dtype)
        return search_grid(
            W, problem.H_diag, bits=self.bits, group=group, symmetric=self.symmetric, dtype=dtype
        )

    def pack(self, codes: Tensor, grid: Grid, problem: LayerProblem) -> Quantized:
        zero = None if self.symmetric else grid.zero
        return Quantized.pack(
            codes, grid.scale, zero, bits=self.bits, group=grid.group, dtype=problem.dtype
        )

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        rows, columns = shape
        groups = 1 if self.group == "channel" else -(-columns // self.group)
        zeros = 0 if self.symmetric else -(-rows * self.bits // 32) * 4 * groups
        return rows * (-(-columns * self.bits // 32) * 4 + 2 * groups) + zeros + 16
