"""Fewer blocks: which go, and what is made good of their absence."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.compressors.base import StructureCompressor

RIDGE = 0.1  # of the mean diagonal: ten times what solvers add, chosen on held-out calibration text


class Depth(StructureCompressor):
    """Drop whole blocks, those that the model misses least (ShortGPT, arXiv 2403.03853).

    Block influence is 1 − E cos(x_l, x_{l+1}) of the hidden states before and after block l. Of the
    ``shortlist`` blocks with the least, the one goes whose absence costs the least
    KL(original ‖ without it) on the calibration text (SLEB, arXiv 2402.09025), and so on until
    ``amount`` of all blocks has gone. ``choose: influence`` takes the least influence as it is.

    Repair: what a cut leaves out of the hidden state, R = X_original − X̂, is regressed on the
    inputs A of the matrix that wrote the hidden state last before the cut, and folded into it:
    W + RᵀA (AᵀA + λI)⁻¹, the bias likewise. No parameter is added. A repair that does not lower the
    KL is taken back. With ``blocks`` only these may go. The model is in memory twice, as float32.
    """

    choose: Literal["kl", "influence"] = Field(
        "kl", description="by the true KL to the original, or by block influence alone"
    )
    shortlist: int = Field(8, ge=1, description="blocks of least influence whose KL is measured")
    repair: bool = Field(True, description="fold what is missing into the matrix before the cut")

    default_targets: ClassVar = ("blocks",)


def seam(missing: Tensor, moments: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
    """What to add to a matrix and its bias so that they make what is missing, by ridge regression.

    missing  float32 [out, in + 1]: RᵀA / T for residuals R [T, out] and the inputs A [T, in] of the
             matrix, with a last column of ones
    moments  float32 [in + 1, in + 1]: AᵀA / T
    centred  whether there is a bias, which takes the means; it is zero otherwise
    Returns float32 [out, in] and [out].
    """
    H, C = moments.double(), missing.double()
    mean, rest = H[:-1, -1:], C[:, -1:]
    if centred:
        H, C = H - H[:, -1:] * H[-1:], C - rest * H[-1:]
    H, C = H[:-1, :-1], C[:, :-1]
    H = H + RIDGE * H.diagonal().mean().clamp(min=1e-12) * torch.eye(len(H), dtype=H.dtype)
    change = torch.linalg.solve(H, C.T).T
    shift = (rest - change @ mean) if centred else torch.zeros_like(rest)
    return change.float(), shift[:, 0].float()
