"""What all methods that end in packed integers share: the grid's parameters, and its bytes."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Iterable
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor

from compress.compressors.base import LayerCompressor, Shape
from compress.compressors.quantization.bits import share_out
from compress.compressors.quantization.grid import Grid, search_grid
from compress.errors import RecipeError
from compress.problem import LayerProblem
from compress.weights import Quantized, Weight
from compress.weights.quantized import scale_dtype


class PackedIntegers(LayerCompressor, ABC):
    """Weights on a grid of 2^bits points, one scale (and zero-point) per group of inputs."""

    family: ClassVar = "quantization"
    headline: ClassVar = ("bits", "group")
    accepts: ClassVar = frozenset({"dense", "sparse", "lowrank"})
    makes: ClassVar = "quantized"

    bits: int | float = Field(
        4, ge=2, le=8, description="bits a weight; 3.5: on average, chosen for each matrix"
    )
    group: int | Literal["channel"] = Field(
        64, description='inputs that share a scale: a number from 8, or "channel" for a whole row'
    )
    symmetric: bool = Field(
        True, description="no zero-point; the scale's sign turns the grid to the longer tail"
    )

    _bits: dict[str, int] = PrivateAttr(default_factory=dict)  # by site, from prepare

    @field_validator("bits")
    @classmethod
    def _whole(cls, bits: float) -> int | float:
        return int(bits) if bits == int(bits) else bits

    def model_post_init(self, context: object) -> None:
        if isinstance(self.group, int) and self.group < 8:
            raise ValueError(f"group {self.group} is below 8; scales would outweigh the codes")

    def prepare(self, problems: Callable[[], Iterable[LayerProblem]]) -> PackedIntegers:
        """Choose the bits of every site, from its problem in the model that is not yet rounded."""
        if isinstance(self.bits, int):
            return self
        prepared = self.model_copy()
        prepared._bits = share_out(problems(), self.bits, self.trial, self.size)
        return prepared

    def at_site(self, name: str) -> PackedIntegers:
        return self.model_copy(update={"bits": self._bits[name]}) if name in self._bits else self

    def trial(self, problem: LayerProblem, bits: int) -> Weight:
        """About the weight that this method would make in so many bits, quickly."""
        return self.model_copy(update={"bits": bits}).compress(problem)

    def grid(self, W: Tensor, problem: LayerProblem) -> Grid:
        """The best grid for W [out, in] by the problem's input importance."""
        group = W.shape[1] if self.group == "channel" else self.group
        dtype = scale_dtype(problem.dtype)
        if not isinstance(self.bits, int):
            raise RecipeError(f"{self.bits} bits is an average over the matrices of a model")
        return search_grid(
            W, problem.H_diag, bits=self.bits, group=group, symmetric=self.symmetric, dtype=dtype
        )

    def pack(self, codes: Tensor, grid: Grid, problem: LayerProblem) -> Quantized:
        zero = None if self.symmetric else grid.zero
        return Quantized.pack(
            codes, grid.scale, zero, bits=grid.bits, group=grid.group, dtype=problem.dtype
        )

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        return self.size(shape, dtype, self.bits)

    def size(self, shape: Shape, dtype: torch.dtype, bits: float) -> int:
        """Bytes in ``bits`` a weight; between two whole numbers of them, in between."""
        low = math.floor(bits)
        if low < bits:
            below, above = (self.size(shape, dtype, b) for b in (low, low + 1))
            return below + int((bits - low) * (above - below))
        rows, columns = shape
        groups = 1 if self.group == "channel" else -(-columns // self.group)
        zeros = 0 if self.symmetric else -(-rows * low // 32) * 4 * groups
        return rows * (-(-columns * low // 32) * 4 + 2 * groups) + zeros + 16
