"""A rotation that spreads outliers over all channels."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compress.compressors.base import RotationCompressor


class Hadamard(RotationCompressor):
    """Turn the residual stream by R before weights are rounded (QuaRot, arXiv 2404.00456).

    What reads the stream becomes W·diag(g)·R with g the gain of the norm before it, what writes to
    it Rᵀ·W, embeddings E·R; an RMSNorm cannot tell the difference. R = diag(±1)·(H ⊗ Q)/√2^k for a
    width of 2^k·m, H the Hadamard matrix of order 2^k and Q orthogonal of order m, signs and Q
    random; with LayerNorm, reflected so that it keeps the mean of the channels. Everything is
    folded into the weights, so that the inputs of down_proj, and without ``heads`` of o_proj, stay
    as they are. Embedding and head become two tables (``untie: true`` where they were one).
    """

    seed: int = Field(0, ge=0, description="of the random signs")

    def rotation(self, width: int) -> Tensor:
        random = torch.Generator().manual_seed(self.seed)
        odd = width // (width & -width)
        gaussian = torch.randn(odd, odd, generator=random, dtype=torch.float64)
        R = torch.linalg.qr(gaussian).Q
        while len(R) < width:
            R = torch.cat([torch.cat([R, R], 1), torch.cat([R, -R], 1)]) / 2**0.5
        signs = torch.randint(0, 2, (width, 1), generator=random) * 2 - 1
        return signs * R
