"""What all pruning methods share: how many weights go, and in which pattern."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compress.compressors.base import LayerCompressor, Shape
from compress.compressors.pruning.masks import keep_n_of_m, keep_share


class Pruner(LayerCompressor, ABC):
    """Weights set to zero: a share of each matrix, or all but N of every M consecutive inputs."""

    family: ClassVar = "pruning"
    headline: ClassVar = ("sparsity", "pattern")
    accepts: ClassVar = frozenset({"dense", "sparse"})
    makes: ClassVar = "sparse"
    packs: ClassVar = False

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="share of weights set to zero; 0.5 unless pattern says"
    )
    pattern: str | None = Field(
        None, pattern=r"^[1-9]\d*:[1-9]\d*$", description='"2:4" keeps 2 of every 4 inputs'
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
    def _one_of_two(self) -> Pruner:
        if self.pattern is not None:
            if self.sparsity is not None:
                raise ValueError("pattern decides the sparsity; drop 'sparsity'")
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

    def keep(self, score: Tensor) -> Tensor:
        """bool, as ``score`` [out, in]: the weights that stay, of a whole matrix.

        Raises:
            RecipeError: the pattern does not divide the width.
        """
        if self.pattern is not None:
            return keep_n_of_m(score, *self.n_of_m)
        return keep_share(score, self.share)

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        rows, columns = shape
        return round(rows * columns * (1 - self.share)) * dtype.itemsize + rows * -(-columns // 8)
