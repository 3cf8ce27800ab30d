"""The plain matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.weights.base import Weight, spec_of


class Dense(Weight):
    """weight [out, in] in the dtype of the model."""

    kind = "dense"

    @classmethod
    def of(cls, matrix: Tensor, dtype: torch.dtype | None = None) -> Dense:
        stored = matrix.to(dtype or matrix.dtype).contiguous()
        return cls(spec_of("dense", stored, stored.dtype), {"weight": stored})
