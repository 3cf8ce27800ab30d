"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from pydantic import Field, model_validator

from compress.compressors.pruning.masks import keep_share
from compress.compressors.pruning.pruner import Pruner
from compress.problem import LayerProblem
from compress.weights import Sparse


class Magnitude(Pruner):
    """Set the weights with the smallest |w| to zero (Han et al. 2015, arXiv 1506.02626).

    It is the data-free answer to the layer problem (H = I): of all Ŵ with k zeros, the one that
    keeps the largest |w| has the least ‖W − Ŵ‖². With ``pattern`` N:M, N of every M consecutive
    inputs stay (arXiv 2104.08378).
    """

    per: Literal["layer", "row", "global"] = Field(
        "layer", description="what the share holds for: each matrix, each row, or all together"
    )
    threshold: float | None = Field(
        None, ge=0, description="zero every |w| below this; per: global finds it from sparsity"
    )

    @model_validator(mode="after")
    def _pattern_decides(self) -> Magnitude:
        if self.pattern is not None and self.per != "layer":
            raise ValueError("pattern decides the sparsity; drop 'per'")
        return self

    def solve(self, problem: LayerProblem) -> Sparse:
        W = problem.W
        if self.pattern is None and self.threshold is not None:
            keep = (W.abs() >= self.threshold) & (W != 0)
        elif self.per == "row":
            keep = keep_share(W.abs(), self.share, per="row")
        else:
            keep = self.keep(W.abs())
        return Sparse.of(W, keep, problem.dtype)

    def prepare(self, problems: Callable[[], Iterable[LayerProblem]]) -> Magnitude:
        if self.per != "global" or self.threshold is not None:
            return self
        return self.model_copy(update={"threshold": global_threshold(problems, self.share)})


def global_threshold(problems: Callable[[], Iterable[LayerProblem]], sparsity: float) -> float:
    """The |w| below which the share ``sparsity`` of all weights lies, exactly, in two passes.

    The bits of a non-negative float32 order as integers do: one pass counts their upper 16 bits,
    the next counts the lower 16 within the one value of the upper that holds the quantile.
    """
    high = torch.zeros(1 << 15, dtype=torch.int64)
    for problem in problems():
        bits = problem.W.abs().view(torch.int32)
        high += torch.bincount((bits >> 16).flatten(), minlength=1 << 15)
    drop = round(sparsity * int(high.sum()))
    below = high.cumsum(0)
    bucket = int(torch.searchsorted(below, drop, right=True).clamp(max=len(high) - 1))
    before = int(below[bucket - 1]) if bucket else 0
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for problem in problems():
        bits = problem.W.abs().view(torch.int32).flatten()
        low += torch.bincount(bits[bits >> 16 == bucket] & 0xFFFF, minlength=1 << 16)
    lower = int(torch.searchsorted(low.cumsum(0), drop - before, right=True).clamp(max=65535))
    return torch.tensor(bucket << 16 | lower, dtype=torch.int32).view(torch.float32).item()
