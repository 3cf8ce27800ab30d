"""LLM.int8 of bitsandbytes."""

from __future__ import annotations

from typing import ClassVar

import torch

from compress.compressors.base import LayerCompressor, Shape
from compress.problem import LayerProblem
from compress.weights import Int8 as Int8Weight


class Int8(LayerCompressor):
    """Eight bits a weight, one scale a row, in bitsandbytes' format (arXiv 2208.07339).

    ŵ = round(127·w / absmax(row)) · absmax(row) / 127. transformers loads it with bitsandbytes,
    which also rounds activations to 8 bits as it multiplies.
    """

    family: ClassVar = "quantization"
    accepts: ClassVar = frozenset({"dense", "sparse", "lowrank"})
    makes: ClassVar = "int8"
    layouts: ClassVar = frozenset({"linear", "conv1d"})

    def solve(self, problem: LayerProblem) -> Int8Weight:
        return Int8Weight.of(problem.W, problem.dtype)

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        return shape[0] * shape[1] + 4 * shape[0]
