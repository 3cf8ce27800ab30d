"""Scales that move the outliers of activations into the weights."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compress.compressors.base import ScalingCompressor, SharedInput


class SmoothQuant(ScalingCompressor):
    """Even out inputs before activations are rounded (SmoothQuant, arXiv 2211.10438).

    s_j = max |x_j|^α / max_i |W_ij|^(1−α): x is divided by s, columns are multiplied by it, so
    that large inputs take some of the range of the weights. For w8a8; weights alone do not gain.
    """

    alpha: float = Field(
        0.5, ge=0, le=1, description="how much of the outliers goes to the weights (1: all)"
    )

    def scale(self, inputs: SharedInput) -> Tensor:
        weights = torch.stack([W.abs().amax(0) for W in inputs.matrices]).amax(0)
        known = (inputs.most > 0) & (weights > 0)
        scale = torch.ones_like(weights)
        scale[known] = inputs.most[known] ** self.alpha / weights[known] ** (1 - self.alpha)
        return scale.clamp(1e-5, 1e5)
