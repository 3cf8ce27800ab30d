"""A product of two thin matrices, and a sum of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.weights.base import Weight, nested, rounding, spec_of
from compress.weights.dense import Dense
from compress.weights.sparse import Sparse


class LowRank(Weight):
    """left [out, rank] · right [rank, in]; each factor is a weight of any kind."""

    kind = "lowrank"

    @classmethod
    def of(cls, left: Tensor, right: Tensor, dtype: torch.dtype) -> LowRank:
        return cls.join(Dense.of(left, dtype), Dense.of(right, dtype), dtype)

    @classmethod
    def join(cls, left: Weight, right: Weight, dtype: torch.dtype) -> LowRank:
        shape = torch.empty(left.shape[0], right.shape[1], device="meta")
        spec = spec_of(
            "lowrank", shape, dtype, rank=right.shape[0], left=left.spec, right=right.spec
        )
        return cls(spec | rounding(right.spec), nested(left=left, right=right))

    @classmethod
    def balanced(cls, left: Tensor, right: Tensor, dtype: torch.dtype) -> LowRank:
        """The product as U Σ^½ and Σ^½ Vᵀ: factors of one size, none of whose numbers dominate."""
        Q, R = torch.linalg.qr(left.double())
        P, S = torch.linalg.qr(right.double().T)
        U, sigma, Vt = torch.linalg.svd(R @ S.T)
        root = sigma.sqrt()
        return cls.of((Q @ U * root).float(), (root[:, None] * (Vt @ P.T)).float(), dtype)

    @classmethod
    def pivoted(cls, left: Tensor, right: Tensor, dtype: torch.dtype) -> LowRank:
        """The product as its pivot rows, and how the other rows are made of these.

        The right factor is ``rank`` rows of the product itself; the left one is the identity in
        these rows, and stored as a sparse matrix: r² numbers fewer (PIFA, arXiv 2501.19090). Of a
        matrix with fewer columns than rows it is the columns. Pivots are those of an LU
        decomposition, which keeps the numbers of the sparse factor at about 1 and below.
        """
        if len(left) > right.shape[1]:
            made, base = _pivoted(right.T.double(), left.T.double())
            sparse = Sparse.of(made.T.float(), made.T.contiguous() != 0, dtype)
            return cls.join(Dense.of(base.T.float(), dtype), sparse, dtype)
        made, base = _pivoted(left.double(), right.double())
        sparse = Sparse.of(made.float(), made != 0, dtype)
        return cls.join(sparse, Dense.of(base.float(), dtype), dtype)

    @staticmethod
    def pivoted_bytes(shape: tuple[int, int], rank: Tensor, itemsize: int) -> Tensor:
        """Bytes of ``pivoted`` factors for each of the ranks (int64), the mask included."""
        rows, columns = shape
        numbers = rank * (rows + columns - rank + 1)
        mask = rows * ((rank + 7) // 8) if rows <= columns else rank * ((columns + 7) // 8)
        return numbers * itemsize + mask

    @property
    def rank(self) -> int:
        return self.spec["rank"]

    @property
    def left(self) -> Weight:
        return self._factor("left")

    @property
    def right(self) -> Weight:
        return self._factor("right")

    def _factor(self, side: str) -> Weight:
        start = side + "_"
        tensors = {k[len(start) :]: t for k, t in self.tensors.items() if k.startswith(start)}
        return Weight.restore(self.spec[side], tensors)

    @property
    def parameters(self) -> int:
        return self.left.parameters + self.right.parameters


def _pivoted(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with a left factor [out, rank] that is the identity in its pivot rows."""
    rows, rank = left.shape
    factors, swaps, _ = torch.linalg.lu_factor_ex(left)
    order = list(range(rows))
    for i, j in enumerate(swaps.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    made = torch.empty(rows, rank, dtype=left.dtype)
    made[order[:rank]] = torch.eye(rank, dtype=left.dtype)
    made[order[rank:]] = torch.linalg.solve_triangular(
        factors[:rank], factors[rank:], upper=False, left=False, unitriangular=True
    )
    return made, left[order[:rank]] @ right


class Sum(Weight):
    """A packed weight plus what is added to it: a low-rank adapter, a residual."""

    kind = "sum"

    @classmethod
    def of(cls, *terms: Weight) -> Sum:
        base = torch.empty(*terms[0].shape, device="meta")
        spec = spec_of("sum", base, terms[0].dtype, terms=[t.spec for t in terms])
        tensors = nested(**{f"term{i}": t for i, t in enumerate(terms)})
        return cls(spec | rounding(terms[0].spec), tensors)

    @property
    def terms(self) -> list[Weight]:
        out = []
        for i, spec in enumerate(self.spec["terms"]):
            start = f"term{i}_"
            tensors = {k[len(start) :]: t for k, t in self.tensors.items() if k.startswith(start)}
            out.append(Weight.restore(spec, tensors))
        return out

    @property
    def parameters(self) -> int:
        return sum(term.parameters for term in self.terms)
