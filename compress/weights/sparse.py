"""A matrix with zeros: the values kept, and one bit an entry that says which."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.errors import RecipeError
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

    @classmethod
    def keep_largest(
        cls,
        matrix: Tensor,
        score: Tensor,
        sparsity: float,
        *,
        per: str = "layer",
        dtype: torch.dtype | None = None,
    ) -> Sparse:
        """Zero the share ``sparsity`` of entries with the smallest score, per "layer" or "row".

        Exactly round(sparsity · n) entries go, of equal scores the earlier ones first.
        """
        flat = score.reshape(1, -1) if per == "layer" else score
        drop = round(sparsity * flat.shape[1])
        order = flat.argsort(dim=1, stable=True)
        mask = torch.ones_like(flat, dtype=torch.bool).scatter_(1, order[:, :drop], False)
        return cls.of(matrix, mask.view_as(matrix), dtype)

    @classmethod
    def keep_n_of_m(
        cls, matrix: Tensor, score: Tensor, n: int, m: int, dtype: torch.dtype | None = None
    ) -> Sparse:
        """Keep the ``n`` best scores of every ``m`` consecutive inputs of a row.

        Raises:
            RecipeError: the input width is not a multiple of ``m``.
        """
        rows, columns = matrix.shape
        if columns % m:
            raise RecipeError(
                f"pattern {n}:{m} needs an input width divisible by {m}, "
                f"this weight is {rows}×{columns}"
            )
        order = score.view(rows, -1, m).argsort(dim=2, stable=True, descending=True)
        mask = torch.zeros_like(order, dtype=torch.bool).scatter_(2, order[..., :n], True)
        return cls.of(matrix, mask.view(rows, columns), dtype)

    @property
    def parameters(self) -> int:
        return self.tensors["values"].numel()
