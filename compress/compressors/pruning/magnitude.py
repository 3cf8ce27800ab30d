"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator

from compress.compressors.base import LayerCompressor, Shape
from compress.problem import LayerProblem
from compress.weights import Sparse


class Magnitude(LayerCompressor):
    """Set the weights with the smallest |w| to zero (Han et al. 2015, arXiv 1506.02626).

    It is the data-free answer to the layer problem (H = I): of all Ŵ with k zeros, the one that
    keeps the largest |w| has the least ‖W − Ŵ‖². With ``pattern`` N:M, N of every M consecutive
    inputs stay (arXiv 2104.08378).
    """

    family: ClassVar = "pruning"
    accepts: ClassVar = frozenset({"dense", "sparse"})
    makes: ClassVar = "sparse"
    packs: ClassVar = False

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="share of weights set to zero; 0.5 unless pattern says"
    )
    per: Literal["layer", "row", "global"] = Field(
        "layer", description="what the share holds for: each matrix, each row, or all together"
    )
    pattern: str | None = Field(
        None, pattern=r"^[1-9]\d*:[1-9]\d*$", description='"2:4" keeps 2 of every 4 inputs'
    )
    threshold: float | None = Field(
        None, ge=0, description="zero every |w| below this; per: global finds it from sparsity"
    )

    @field_validator("pattern", mode="before")
    @classmethod
    def _unquoted(cls, value: object) -> object:
        """YAML reads an unquoted 2:4 as minutes and seconds, 124."""
        return f"{value // 60}:{value % 60}" if isinstance(value, int) else value

    @model_validator(mode="before")
    @classmethod
    def _half(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("pattern") is None and raw.get("sparsity") is None:
            return {**raw, "sparsity": 0.5}
        return raw

    @model_validator(mode="after")
    def _one_pattern(self) -> Magnitude:
        if self.pattern is not None:
            if self.sparsity is not None or self.per != "layer":
                raise ValueError("pattern decides the sparsity; drop 'sparsity' and 'per'")
            n, m = self.n_of_m
            if n >= m:
                raise ValueError(f"pattern {self.pattern} keeps everything; N must be below M")
        return self

    @property
    def share(self) -> float:
        """The share of weights that go."""
        n, m = self.n_of_m
        return 1 - n / m if self.sparsity is None else self.sparsity

    @property
    def n_of_m(self) -> tuple[int, int]:
        n, _, m = (self.pattern or "1:1").partition(":")
        return int(n), int(m)

    def solve(self, problem: LayerProblem) -> Sparse:
        W = problem.W
        if self.pattern is not None:
            return Sparse.keep_n_of_m(W, W.abs(), *self.n_of_m, dtype=problem.dtype)
        if self.threshold is not None:
            return Sparse.of(W, (W.abs() >= self.threshold) & (W != 0), problem.dtype)
        per = "row" if self.per == "row" else "layer"
        return Sparse.keep_largest(W, W.abs(), self.share, per=per, dtype=problem.dtype)

    def prepare(self, problems: Callable[[], Iterable[LayerProblem]]) -> Magnitude:
        if self.per != "global" or self.threshold is not None:
            return self
        return self.model_copy(update={"threshold": global_threshold(problems, self.share)})

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        rows, columns = shape
        return round(rows * columns * (1 - self.share)) * dtype.itemsize + rows * -(-columns // 8)


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
