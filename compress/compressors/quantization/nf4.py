"""NF4 of bitsandbytes."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from compress.compressors.base import LayerCompressor, Shape
from compress.problem import LayerProblem
from compress.weights import NF4 as NF4Weight


class NF4(LayerCompressor):
    """Four bits a weight on the quantiles of a normal distribution (QLoRA, arXiv 2305.14314).

    ŵ = absmax(block) · c_k with the nearest of 16 fixed levels c; in bitsandbytes' format. With
    ``double_quant`` the absmax values are stored in 8 bits, 0.37 bits a weight less.
    """

    family: ClassVar = "quantization"
    accepts: ClassVar = frozenset({"dense", "sparse", "lowrank"})
    makes: ClassVar = "nf4"
    layouts: ClassVar = frozenset({"linear", "conv1d"})

    group: Literal[64, 128, 256, 512] = Field(64, description="weights that share an absmax")
    double_quant: bool = Field(False, description="quantize the absmax values as well")

    def solve(self, problem: LayerProblem) -> NF4Weight:
        return NF4Weight.of(
            problem.W, problem.dtype, block=self.group, double_quant=self.double_quant
        )

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        count = shape[0] * shape[1]
        blocks = -(-count // self.group)
        scales = blocks + -(-blocks // 256) * 4 + 1024 if self.double_quant else 4 * blocks
        return -(-count // 2) + scales + 64 + (170 if self.double_quant else 90)
