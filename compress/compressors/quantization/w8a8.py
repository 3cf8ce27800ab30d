"""Eight bits for weights and for what they multiply."""

from __future__ import annotations

from typing import ClassVar

import torch

from compress.compressors.base import LayerCompressor, Shape
from compress.compressors.quantization.rtn import RTN
from compress.problem import LayerProblem
from compress.weights import Quantized

ROUND = RTN(bits=8, group="channel", symmetric=True)


class W8A8(LayerCompressor):
    """8-bit weights, one scale a row, and inputs rounded to 8 bits a token as they come.

    ŵ = s·round(w/s) as ``rtn`` does it; x̂ = t·round(x/t), t = max |x| / 127½ of the token, which
    costs no text and no byte. In compressed-tensors' int-quantized form, for which vLLM has integer
    kernels; transformers rounds as it would and multiplies in the model's dtype. Outliers among
    the inputs cost precision in all others: see ``smoothquant`` (arXiv 2211.10438).
    """

    family: ClassVar = "quantization"
    accepts: ClassVar = frozenset({"dense", "sparse"})
    makes: ClassVar = "quantized"
    layouts: ClassVar = frozenset({"linear", "conv1d"})

    def solve(self, problem: LayerProblem) -> Quantized:
        made = ROUND.solve(problem)
        return Quantized(made.spec | {"activations": 8}, made.tensors)

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        return ROUND.predict(shape, dtype)
