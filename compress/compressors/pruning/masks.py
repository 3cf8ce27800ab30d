"""Which weights stay: the share with the best scores, or the best N of every M."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compress.errors import RecipeError


def keep_share(score: Tensor, sparsity: float, per: Literal["layer", "row"] = "layer") -> Tensor:
    """bool, as ``score`` [out, in]: all but the share ``sparsity`` with the smallest scores.

    Exactly round(sparsity · n) go, n = entries of the layer or of a row; of equal scores the
    earlier ones first.
    """
    flat = score.reshape(1, -1) if per == "layer" else score
    drop = round(sparsity * flat.shape[1])
    order = flat.argsort(dim=1, stable=True)
    keep = torch.ones_like(flat, dtype=torch.bool).scatter_(1, order[:, :drop], False)
    return keep.view_as(score)


def keep_n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """bool, as ``score`` [out, in]: the ``n`` best of every ``m`` consecutive inputs of a row.

    Raises:
        RecipeError: the input width is not a multiple of ``m``.
    """
    rows, columns = score.shape
    if columns % m:
        raise RecipeError(
            f"pattern {n}:{m} needs an input width divisible by {m}, "
            f"this weight is {rows}×{columns}"
        )
    order = score.view(rows, -1, m).argsort(dim=2, stable=True, descending=True)
    keep = torch.zeros_like(order, dtype=torch.bool).scatter_(2, order[..., :n], True)
    return keep.view(rows, columns)
