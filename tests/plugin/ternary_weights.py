"""Ternary weights: all that a third-party compressor takes."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from compress import LayerCompressor, LayerProblem
from compress.weights import Quantized
from compress.weights.quantized import scale_dtype


class Ternary(LayerCompressor):
    """Each weight becomes −s, 0 or s, with one s a row (TWN, arXiv 1605.04711).

    ŵ = s·sign(w) where |w| > threshold·mean|w|, else 0; s is the mean |w| of those that stay.
    """

    family: ClassVar = "quantization"
    accepts: ClassVar = frozenset({"dense", "sparse", "lowrank"})
    makes: ClassVar = "quantized"

    threshold: float = Field(0.7, gt=0, lt=1, description="share of the row's mean |w|")

    def solve(self, problem: LayerProblem) -> Quantized:
        W = problem.W
        size = W.abs()
        stays = size > self.threshold * size.mean(1, keepdim=True)
        scale = (size * stays).sum(1, keepdim=True) / stays.sum(1, keepdim=True).clamp(min=1)
        codes = torch.where(stays, W.sign(), 0.0) + 2  # two bits hold 0 to 3; 2 stands for zero
        return Quantized.pack(
            codes,
            scale.to(scale_dtype(problem.dtype)),
            None,
            bits=2,
            group=W.shape[1],
            dtype=problem.dtype,
        )

    def predict(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        rows, columns = shape
        return rows * (-(-columns // 16) * 4 + 2) + 16
