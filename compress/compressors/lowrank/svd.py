"""Truncated singular value decomposition, of a matrix or of what it does to its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from compress.compressors.base import Shape
from compress.compressors.budget import allocate
from compress.compressors.lowrank.truncation import Truncation, projections
from compress.problem import LayerProblem
from compress.weights import Dense, LowRank, Weight


class SVD(Truncation):
    """Keep the rank r that leaves the least error, Σ_{i>r} σ_i²: Ŵ = A [out, r] · B [r, in].

    Without data σ are the singular values of W (Eckart–Young 1936), with data those of T H^½
    (SVD-LLM, arXiv 2403.07378; T is W corrected for upstream error, as in AA-SVD, 2604.02119), and
    where the loss's gradients were measured, those of F^½ T H^½. With data ranks, too, are chosen
    for all matrices together, so that Σ of all errors is least (without gradients each error over
    the norm of its outputs); where factors do not pay a matrix stays dense. Of A only the rows that
    are not pivots are stored (PIFA, arXiv 2501.19090): r·(out + in − r) numbers; before factors are
    packed in 4 bits, ``pivoted: false`` is better. SVD-LLM as published is
    ``propagate: 0, loss_weighted: false, ranks: uniform, pivoted: false``.

    Gradients take a backward pass through the whole model, in memory as float32. A model too large
    for that is compressed block by block with ``loss_weighted: false``.
    """

    accepts: ClassVar = frozenset({"dense", "sparse"})
    makes: ClassVar = "lowrank"
    needs_text: ClassVar = False

    rank: int | None = Field(None, ge=1, description="rank of every matrix")
    ratio: float | None = Field(None, gt=0, le=1, description="share of bytes kept, 0.5 if unsaid")
    energy: float | None = Field(
        None, gt=0, lt=1, description="share of Σσ² kept, matrix by matrix"
    )
    ranks: Literal["global", "uniform"] = Field(
        "global",
        description="what ratio holds for: all matrices together, where there is data; or each",
    )
    pivoted: bool = Field(
        True, description="leave out the r² numbers that a factor has too many (PIFA)"
    )
    _chosen: dict[str, int | None] = PrivateAttr(default_factory=dict)  # by site, from prepare

    @model_validator(mode="after")
    def _one_of_three(self) -> SVD:
        given = [n for n in ("rank", "ratio", "energy") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of rank, ratio and energy, not {' and '.join(given)}")
        return self

    def prepare(self, problems: Callable[[], Iterable[LayerProblem]]) -> SVD:
        """Choose ranks for all sites together, from their problems in the uncompressed model."""
        if self.ranks == "uniform" or self.metric == "weights":
            return self
        if self.rank is not None or self.energy is not None:
            return self
        names, options, whole = [], [], 0
        for problem in problems():
            T, H, F = self.sees(problem)
            if H is None:
                return self
            sigma = projections(T, H, F)[0]
            if F is None:  # errors over the norm of the outputs: found better than either alone
                sigma = sigma / sigma.square().sum().clamp(min=1e-300) ** 0.25
            names.append(problem.name)
            options.append(self._options(problem, sigma))
            whole += int(options[-1][0][-1])
        chosen: dict[str, int | None] = {}
        for name, option, c in zip(
            names, options, allocate(options, int(self._ratio * whole)), strict=True
        ):
            chosen[name] = c + 1 if c + 1 < len(option[0]) else None
        prepared = self.model_copy()
        prepared._chosen = chosen
        return prepared

    def solve(self, problem: LayerProblem) -> Weight:
        T, H, F = self.sees(problem)
        shape, dtype = problem.weight.shape, problem.dtype
        if problem.name in self._chosen:
            rank = self._chosen[problem.name]
            if rank is None:
                return Dense.of(T, dtype)
            _, P, Q = projections(T, H, F)
        else:
            sigma, P, Q = projections(T, H, F)
            rank = self._rank(shape, dtype.itemsize, sigma)
            if rank is None:
                return Dense.of(T, dtype)
        A, B = P[:, :rank], Q[:, :rank].T @ T.double()
        return LowRank.pivoted(A, B, dtype) if self.pivoted else LowRank.balanced(A, B, dtype)

    @property
    def _ratio(self) -> float:
        return 0.5 if self.ratio is None else self.ratio

    def _bytes(self, shape: Shape, itemsize: int) -> Tensor:
        """int64 [min(out, in)], the bytes of factors of rank 1, 2, …"""
        rows, columns = shape
        rank = torch.arange(1, min(shape) + 1)
        if self.pivoted:
            return LowRank.pivoted_bytes(shape, rank, itemsize)
        return rank * (rows + columns) * itemsize

    def _options(self, problem: LayerProblem, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(bytes, error) of every rank that is smaller than the dense matrix, and of that."""
        rows, columns = problem.weight.shape
        itemsize = problem.dtype.itemsize
        size = self._bytes(problem.weight.shape, itemsize)
        tail = sigma.square().flip(0).cumsum(0).flip(0)
        error = torch.cat([tail[1:], tail.new_zeros(1)])
        dense = rows * columns * itemsize
        pays = size < dense
        return (
            torch.cat([size[pays], torch.tensor([dense])]),
            torch.cat([error[pays], tail.new_zeros(1)]),
        )

    def _rank(self, shape: Shape, itemsize: int, sigma: Tensor | None) -> int | None:
        """The rank for a matrix of this shape, or None where factors would not be smaller."""
        size = self._bytes(shape, itemsize)
        dense = shape[0] * shape[1] * itemsize
        if self.energy is not None:
            if sigma is None:
                rank = len(size)
            else:
                share = sigma.square().cumsum(0) / sigma.square().sum().clamp(min=1e-300)
                rank = int((share < self.energy).sum()) + 1
        elif self.rank is not None:
            rank = self.rank
        elif self._ratio == 1:
            return None
        else:
            rank = max(1, int((size <= self._ratio * dense).sum()))
        return rank if rank <= len(size) and size[rank - 1] < dense else None

    def rank_of(self, shape: Shape, dtype: torch.dtype) -> int | None:
        """The rank for a matrix of this shape, before any is chosen; None where it stays dense."""
        return self._rank(shape, dtype.itemsize, None)

    def pieces(self, shape: Shape) -> list[Shape]:
        rank = self._rank(shape, 2, None)
        return [shape] if rank is None else [(shape[0], rank), (rank, shape[1])]

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        rank = self._rank(shape, dtype.itemsize, None)
        if rank is None:
            return shape[0] * shape[1] * dtype.itemsize
        return int(self._bytes(shape, dtype.itemsize)[rank - 1])
