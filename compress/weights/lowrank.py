"""A product of two thin matrices, and a sum of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.weights.base import Weight, nested, spec_of
from compress.weights.dense import Dense


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
        return cls(spec, nested(left=left, right=right))

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


class Sum(Weight):
    """A packed weight plus what is added to it: a low-rank adapter, a residual."""

    kind = "sum"

    @classmethod
    def of(cls, *terms: Weight) -> Sum:
        base = torch.empty(*terms[0].shape, device="meta")
        spec = spec_of("sum", base, terms[0].dtype, terms=[t.spec for t in terms])
        return cls(spec, nested(**{f"term{i}": t for i, t in enumerate(terms)}))

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
