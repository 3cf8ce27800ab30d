"""Zeros on a grid: mask, then integers, in one pass."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from compress.compressors.base import PROPAGATE, CalibratedCompressor, Shape
from compress.compressors.pruning.admm import ADMM
from compress.compressors.quantization.gptq import GPTQ
from compress.problem import LayerProblem
from compress.weights import Masked, Weight


class GPTQSparse(CalibratedCompressor):
    """``admm`` chooses what stays, ``gptq`` rounds that and makes up for both (arXiv 2301.00774).

    Stored are a bit a weight that says which stay, and the integers of these: (1 − s)·b + 1 bits,
    and scales. At 2 to 3 bits in all that loses less than integers alone in groups; ``ecgptq``
    loses less than either.
    """

    family: ClassVar = "quantization"
    headline: ClassVar = ("bits", "sparsity")
    makes: ClassVar = "masked"

    bits: int = Field(3, ge=2, le=8, description="bits of a weight that stays")
    sparsity: float = Field(0.5, ge=0, lt=1, description="share of weights set to zero")
    group: int | Literal["channel"] = Field(64, description="inputs that share a scale, as gptq's")
    propagate: float = Field(0.75, ge=0, le=1, description=PROPAGATE)
    polish: int = Field(4, ge=0, description="as gptq's")

    def data_free(self) -> GPTQSparse:
        return self

    def best(self, problem: LayerProblem) -> tuple[Weight, str]:
        return self.solve(problem), self.name

    def solve(self, problem: LayerProblem) -> Masked:
        pruned = ADMM.model_validate({"sparsity": self.sparsity, "allocation": "uniform"}).solve(
            problem
        )
        given = replace(problem, weight=pruned, goal=problem.target)
        return Masked.of(self.rounding.solve(given), pruned)

    @property
    def rounding(self) -> GPTQ:
        """What rounds the weights that stay."""
        return GPTQ.model_validate(self.model_dump(include=set(GPTQ.model_fields)))

    def kept(self, shape: Shape) -> int:
        """Weights of a matrix of this shape that stay."""
        count = shape[0] * shape[1]
        return count - round(self.sparsity * count)

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        rows, columns = shape
        groups = 1 if self.group == "channel" else -(-columns // self.group)
        packed = -(-self.kept(shape) * self.bits // 32) * 4
        return packed + rows * (-(-columns // 8) + 2 * groups)
