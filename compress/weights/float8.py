"""Eight-bit floating-point numbers, a scale for every row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.weights.base import Weight, spec_of
from compress.weights.modeling_compressed import LARGEST


class Float8(Weight):
    """Numbers of 4 exponent and 3 mantissa bits, as compressed-tensors' ``float-quantized``.

    codes         uint8 [out, in], the bits of a float8_e4m3fn each: no cast of a model touches them
    weight_scale  [out, 1], 16-bit
    """

    kind = "float8"

    @classmethod
    def of(cls, matrix: Tensor, scale: Tensor, dtype: torch.dtype, **numbers: Any) -> Float8:
        """Round ``matrix`` [out, in] to the nearest; ``scale`` [out, 1] in its storage dtype.

        ``numbers`` go into the spec.
        """
        tensors = {"codes": rounded(matrix, scale).view(torch.uint8), "weight_scale": scale}
        return cls(spec_of("float8", matrix, dtype, **numbers), tensors)


def rounded(matrix: Tensor, scale: Tensor) -> Tensor:
    """float8_e4m3fn [out, in], the nearest to matrix / scale; what is too large is the largest."""
    return (matrix / scale.float()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
