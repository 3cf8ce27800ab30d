"""A weight matrix as it is stored: a JSON spec and the tensors of one kind of storage.

What is held in memory is what is written to disk, so the round trip is the identity and ``nbytes``
is exact. The kinds are subclasses that know how to make themselves from a matrix; turning any of
them back into a matrix is ``decode`` in ``modeling_compressed.py``, the one place that does it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.weights.modeling_compressed import decode


class Weight:
    """One weight [out, in] in one kind of storage. Treat as immutable."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Weight]]] = {}

    def __init__(self, spec: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.spec = spec
        self.tensors = tensors

    def __init_subclass__(cls) -> None:
        cls.kinds[cls.kind] = cls

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Weight:
        """The weight that was taken apart into ``spec`` and ``tensors``."""
        return cls.kinds[spec["kind"]](spec, tensors)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.spec["shape"]
        return rows, columns

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense matrix this weight stands for."""
        return getattr(torch, self.spec["dtype"])

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Numbers that inference reads: entries kept, factors' entries, or all entries."""
        return self.shape[0] * self.shape[1]

    def dense(self) -> Tensor:
        """float32 [out, in]."""
        tensors = {n: t.float() if t.is_floating_point() else t for n, t in self.tensors.items()}
        return decode(self.spec, tensors).float()

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"{type(self).__name__}({rows}×{columns}, {self.nbytes:,} bytes)"


def spec_of(kind: str, matrix: Tensor, dtype: torch.dtype, **numbers: Any) -> dict[str, Any]:
    """The part of a spec that every kind has, and the kind's own numbers."""
    return {"kind": kind, "shape": list(matrix.shape), "dtype": str(dtype).split(".")[1], **numbers}


def rounding(spec: dict[str, Any]) -> dict[str, Any]:
    """The part of a spec that says how what a site reads is rounded; empty if it is not."""
    return {key: spec[key] for key in ("activations",) if key in spec}


def nested(**weights: Weight) -> dict[str, Tensor]:
    """Tensors of several weights in one dictionary, each behind its prefix."""
    return {f"{prefix}_{k}": t for prefix, w in weights.items() for k, t in w.tensors.items()}
