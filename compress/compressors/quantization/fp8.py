"""Eight bits a weight, as floating-point numbers."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from compress.compressors.base import LayerCompressor, Shape
from compress.problem import LayerProblem
from compress.weights import Float8
from compress.weights.float8 import rounded
from compress.weights.modeling_compressed import LARGEST
from compress.weights.quantized import scale_dtype

STEPS = 8  # scales tried within a factor of two; further on the same grid comes again


class FP8(LayerCompressor):
    """8-bit floats E4M3 (arXiv 2209.05433), one scale a row.

    ŵ = s·e4m3(w/s), s the one of least Σ h (ŵ − w)² among 2^(k/8)·max |w| / 448, k = 0 … 7. The
    step is 1/16 of each weight's own size, so that large weights cost small ones nothing; where a
    row has no outliers, integers of 8 bits are closer. In compressed-tensors' float-quantized
    form.
    """

    family: ClassVar = "quantization"
    accepts: ClassVar = frozenset({"dense", "sparse", "lowrank"})
    makes: ClassVar = "float8"
    layouts: ClassVar = frozenset({"linear", "conv1d"})

    activations: bool = Field(
        False, description="whether inputs are rounded as well, each token by its largest"
    )

    def solve(self, problem: LayerProblem) -> Float8:
        W, dtype = problem.W, scale_dtype(problem.dtype)
        limit = torch.finfo(dtype)
        reach = W.abs().amax(1, keepdim=True) / LARGEST
        best = torch.ones_like(reach).to(dtype)
        least = torch.full_like(reach, torch.inf)
        for k in range(STEPS):
            scale = (2 ** (k / STEPS) * reach).clamp(limit.tiny, limit.max).to(dtype)
            values = rounded(W, scale).float() * scale.float()
            error = ((values - W).square() * problem.H_diag).sum(1, keepdim=True)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        numbers = {"activations": "float8"} if self.activations else {}
        return Float8.of(W, best, problem.dtype, **numbers)

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        return shape[0] * shape[1] + 2 * shape[0]
