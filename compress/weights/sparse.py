"""A matrix with zeros: the values kept, and one bit an entry that says which."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.weights.base import Weight, spec_of


class Sparse(Weight):
    """values [kept] in row order; mask uint8 [out, ⌈in/8⌉], most significant bit first.

    Bytes: sparsity s of 16-bit weights takes (1 − s)·16 + 1 bits an entry.
    """

    kind = "sparse"

    @classmethod
    def of(cls, matrix: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Sparse:
        """Keep ``matrix`` [out, in] where ``mask`` (bool, same shape) is true."""
        dtype = dtype or matrix.dtype
        bits = torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1))
        values = matrix[mask].to(dtype)
        return cls(spec_of("sparse", matrix, dtype), {"values": values, "mask": bits})

    @property
    def parameters(self) -> int:
        return self.tensors["values"].numel()
