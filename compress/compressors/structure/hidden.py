"""A narrower residual stream: which directions of it are kept, and what reads and writes them."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.compressors.base import (
    PROPAGATE,
    CalibratedCompressor,
    LayerCompressor,
    StructureCompressor,
)
from compress.problem import LayerProblem
from compress.weights import Dense, Weight

FLOOR = 1e-6  # of the mean gradient: where there is none, variance decides


class Hidden(StructureCompressor):
    """Narrow the residual stream (``hidden_size``) to the directions that count most.

    An RMSNorm whose gain its readers have taken cannot tell x from x·R with R orthogonal, so the
    stream is written in coordinates of which the last can go: columns of what reads it and of
    embeddings, rows of what writes to it (SliceGPT, arXiv 2401.15024; there each block has an R of
    its own and a matrix between any two, here one R serves all, and the folder is an ordinary,
    narrower model). Readers and writers are then solved block by block for the inputs that they
    have in it, by least squares.

    With C = E[xxᵀ] of what norms put out, and G = E[ggᵀ] of the loss's gradient there, over all
    norms and tokens, R holds the eigenvectors of C^½ G C^½, leading ones first: where x is white,
    what the loss feels most. Without ``loss_weighted`` G is the identity and that is PCA, which
    keeps what varies most, felt or not. ``targets`` is the whole model; embedding and head become
    two tables (``untie: true`` where they were one).
    """

    multiple: int = Field(32, ge=1, description="what stays of the width is a multiple of it")
    loss_weighted: bool = Field(
        True, description="keep what the loss feels, and not only what varies most"
    )
    propagate: float = Field(1.0, ge=0, le=1, description=PROPAGATE)

    layouts: ClassVar = frozenset({"linear", "conv1d", "embedding"})
    default_targets: ClassVar = ("all",)


class Slice(CalibratedCompressor):
    """What Hidden does to each matrix in the old width: rows or columns that go are zero.

    Inputs that are zero have no part in the correction for what the narrower model's blocks put
    out, which is then the least-squares answer for those that stay.

    keep     coordinates of the stream that stay, the first
    readers  sites whose columns are coordinates of the stream; of others rows are
    """

    name: ClassVar = "hidden"

    keep: int = Field(description="coordinates that stay")
    readers: frozenset[str] = Field(description="sites whose columns are coordinates")

    def data_free(self) -> LayerCompressor:
        return self

    def solve(self, problem: LayerProblem) -> Weight:
        zeroed = sliced(problem.target, self.keep, reads=problem.name in self.readers)
        return Dense.of(zeroed, problem.dtype)

    def best(self, problem: LayerProblem) -> tuple[Weight, str]:
        return self.solve(problem), self.name


def sliced(W: Tensor, keep: int, *, reads: bool) -> Tensor:
    """W [out, in], zero but for its first ``keep`` columns, if it ``reads``; or else rows."""
    zeroed = torch.zeros_like(W)
    kept = (slice(None), slice(keep)) if reads else (slice(keep), slice(None))
    zeroed[kept] = W[kept]
    return zeroed


def directions(C: Tensor, G: Tensor | None = None) -> Tensor:
    """float64 [width, width], orthogonal: directions in its columns, those to keep first.

    C  [width, width], second moments of the stream
    G  the same of the loss's gradient; without it variance alone counts
    """
    values, vectors = torch.linalg.eigh(C.double())
    if G is None or not G.any():
        return vectors.flip(1).contiguous()
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C = root²
    felt = G.double() + FLOOR * G.diagonal().mean() * torch.eye(len(G), dtype=torch.float64)
    return torch.linalg.eigh(root @ felt @ root).eigenvectors.flip(1).contiguous()
