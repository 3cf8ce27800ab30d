"""Entropy-coded rounding to nearest."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

import torch
from pydantic import Field

from compress.compressors.base import LayerCompressor, Shape
from compress.compressors.quantization.steps import Steps, within
from compress.problem import LayerProblem
from compress.weights import Coded


class EntropyCoded(LayerCompressor, ABC):
    """Integers on uniform grids, in as many bits as their frequencies ask for."""

    family: ClassVar = "quantization"
    headline: ClassVar = ("bits",)
    accepts: ClassVar = frozenset({"dense", "lowrank"})
    makes: ClassVar = "coded"

    bits: float = Field(
        3.0, ge=0.25, le=6, description="bits a weight in the file, everything counted"
    )

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        return int(shape[0] * shape[1] * self.bits / 8)


class ECRTN(EntropyCoded):
    """Round to the nearest multiple of one step, and write the integers in a Huffman code.

    ŵ = Δ·round(w/Δ); Δ is the smallest whose code fits into the bits. At equal error that takes
    about a sixth fewer bits than a grid of 2^b points, as rare values may be far out and frequent
    ones take few bits (entropy-coded scalar quantization: Gish and Pierce 1968). No group of
    weights needs a scale of its own. The file shrinks; in memory the weight is what it was.
    """

    def solve(self, problem: LayerProblem) -> Coded:
        W = problem.W
        spread = W.square().mean().sqrt().clamp(min=1e-30)

        def make(factor: float) -> Coded:
            steps = Steps.of(torch.full((len(W),), factor), torch.ones(W.shape[1]))
            return steps.coded(steps.codes(W), problem.dtype)

        start = 4 * float(spread) * 2.0**-self.bits
        return within(make, start, self.predict(problem.weight.shape, problem.dtype))
