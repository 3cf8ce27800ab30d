"""Integers and a low-rank correction of what they lost, made in one pass."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field

from compress.compressors.base import PROPAGATE, CalibratedCompressor, Shape
from compress.compressors.lowrank.residual import Residual
from compress.compressors.quantization.gptq import GPTQ
from compress.compressors.quantization.packed import PackedIntegers
from compress.problem import LayerProblem
from compress.weights import Sum, Weight


class GPTQResidual(PackedIntegers, CalibratedCompressor):
    """``gptq``, then ``residual``: Ŵ = Q + A·B, matrix by matrix (LQER, arXiv 2402.02446).

    As two stages the blocks that follow see Q alone while they are rounded; here they see the sum.
    A·B is what two thin factors can best give back of T − Q, by what the loss feels of the outputs.
    """

    accepts: ClassVar = frozenset({"dense"})
    makes: ClassVar = "sum"
    layouts: ClassVar = frozenset({"linear", "conv1d"})

    propagate: float = Field(0.75, ge=0, le=1, description=PROPAGATE)
    polish: int = Field(4, ge=0, description="as gptq's")
    ratio: float = Field(
        0.03125, gt=0, le=1, description="numbers of the factors, as a share of the matrix's"
    )

    @property
    def reads_gradients(self) -> bool:
        return True

    def data_free(self) -> GPTQResidual:
        return self

    def best(self, problem: LayerProblem) -> tuple[Weight, str]:
        return self.solve(problem), self.name

    def trial(self, problem: LayerProblem, bits: int) -> Weight:
        return self.model_copy(update={"bits": bits, "polish": 0}).compress(problem)

    def solve(self, problem: LayerProblem) -> Sum:
        settings = self.model_dump(include=set(GPTQ.model_fields))
        packed = GPTQ.model_validate(settings).solve(problem)
        lost = replace(problem, weight=packed, goal=problem.target)
        return self.correction.solve(lost)

    @property
    def correction(self) -> Residual:
        return Residual.model_validate({"ratio": self.ratio})

    def rank_of(self, shape: Shape) -> int:
        """Of the factors for a matrix of this shape."""
        return self.correction.rank_of(shape)

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        return super().predict(shape, dtype) + self.rank_of(shape) * sum(shape) * dtype.itemsize
