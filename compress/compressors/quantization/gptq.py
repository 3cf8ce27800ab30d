"""Rounding that makes up for itself: GPTQ on the best grid, then coordinate descent."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from compress.compressors.base import CalibratedCompressor
from compress.compressors.quantization.grid import Grid
from compress.compressors.quantization.packed import PackedIntegers
from compress.compressors.quantization.rtn import RTN
from compress.moments import Moments
from compress.problem import LayerProblem
from compress.weights import Quantized

BLOCK = 128  # inputs whose errors are carried on one by one before the rest learn of them


class GPTQ(PackedIntegers, CalibratedCompressor):
    """Round the inputs one after another, each time moving the rest to make up (arXiv 2210.17323).

    Inputs come in descending order of H_jj, on a grid searched before. Then ``polish`` rounds of
    coordinate descent (q_j ← round(q_j − E_j/H_jj), E = (Ŵ − T)H) and of the least-squares scales
    for the codes as they are; every step of that lowers tr((T − Ŵ) H (T − Ŵ)ᵀ). Of a pruned weight
    the zeros stay zeros, whose errors the others make up for, too.
    """

    polish: int = Field(
        4,
        ge=0,
        description="rounds of coordinate descent and scale refit, fewer if one gains under 1%",
    )

    def data_free(self) -> RTN:
        return RTN(bits=self.bits, group=self.group, symmetric=self.symmetric)

    def solve(self, problem: LayerProblem) -> Quantized:
        T = problem.target
        moments = problem.moments or Moments(torch.eye(T.shape[1]))
        keep = problem.W != 0 if problem.weight.kind == "sparse" else None
        grid = self.grid(T if keep is None else T * keep, problem)
        codes = round_with_feedback(T, grid, moments, keep)
        wrong = torch.inf
        for _ in range(self.polish):
            codes = descend(codes, T, grid, moments, keep)
            grid = refit_scales(codes, T, grid, moments)
            before, wrong = wrong, loss(codes, T, grid, moments)
            if wrong > 0.99 * before:
                break
        return self.pack(codes, grid, problem)


def loss(codes: Tensor, T: Tensor, grid: Grid, moments: Moments) -> float:
    """tr((Ŵ − T)(H + λI)(Ŵ − T)ᵀ)"""
    D = grid.values(codes) - T
    return ((D @ moments.damped.float()) * D).sum().item()


def round_with_feedback(
    T: Tensor, grid: Grid, moments: Moments, keep: Tensor | None = None
) -> Tensor:
    """Codes uint8 [out, in] of GPTQ: each rounding error is spread over the inputs to come.

    Where ``keep`` (bool [out, in]) is false the code is the zero-point.
    """
    order, U = moments.inverse_factor()
    back = order.argsort()
    s, z = (x.T[order] for x in grid.spread(T.shape[1]))
    W = T.T[order].clone()  # [in, out], so that an input is contiguous
    codes = torch.empty_like(W)
    for start in range(0, len(W), BLOCK):
        end = min(start + BLOCK, len(W))
        errors = torch.empty(end - start, W.shape[1])
        for j in range(start, end):
            codes[j] = grid.round(W[j], s[j], z[j])
            if keep is not None:
                codes[j] = codes[j].where(keep[:, order[j]], z[j])
            error = (W[j] - (codes[j] - z[j]) * s[j]) / U[j, j]
            W[j + 1 : end] -= U[j, j + 1 : end, None] * error
            errors[j - start] = error
        W[end:] -= U[start:end, end:].T @ errors
    return codes[back].T.to(torch.uint8)


def descend(
    codes: Tensor, T: Tensor, grid: Grid, moments: Moments, keep: Tensor | None = None
) -> Tensor:
    """One sweep of coordinate descent over the inputs: the best code of each, the others fixed.

    Codes where ``keep`` (bool [out, in]) is false stay.
    """
    H = moments.damped.float()
    s, z = (x.T for x in grid.spread(T.shape[1]))
    codes = codes.T.float()
    D = (codes - z) * s - T.T  # Ŵ − T, [in, out]
    diagonal = H.diagonal()
    for start in range(0, len(H), BLOCK):
        end = min(start + BLOCK, len(H))
        E = H[start:end] @ D
        for j in range(start, end):
            wanted = D[j] + T[:, j] - E[j - start] / diagonal[j]
            code = grid.round(wanted, s[j], z[j])
            if keep is not None:
                code = code.where(keep[:, j], codes[j])
            step = (code - codes[j]) * s[j]
            codes[j] = code
            D[j] += step
            E[j - start :] += H[start:end, j][j - start :, None] * step
    return codes.T.to(torch.uint8)


def refit_scales(codes: Tensor, T: Tensor, grid: Grid, moments: Moments) -> Grid:
    """The scales of least error for ``codes``, rows where storage rounding made it worse kept.

    A row's output is Σ_g s_g v_g with v_g = (codes − zero) in group g and 0 elsewhere, so its
    scales solve the normal equations V H Vᵀ s = V H Tᵀ, one small system a row.
    """
    H = moments.damped.float()
    rows, columns = T.shape
    groups = grid.scale.shape[1]
    V = codes.float() - grid.spread(columns)[1]
    pad = groups * grid.group - columns

    def by_group(X: Tensor) -> Tensor:
        return torch.nn.functional.pad(X, (0, pad)).view(rows, groups, grid.group).sum(-1)

    A = torch.empty(rows, groups, groups)
    for g in range(groups):
        own = slice(g * grid.group, min((g + 1) * grid.group, columns))
        A[:, g] = by_group((V[:, own] @ H[own]) * V)
    b = by_group(V * (T @ H))
    A = A.double()
    ridge = 1e-6 * A.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    A = A + ridge[:, None, None] * torch.eye(groups, dtype=torch.float64)
    old = grid.scale.double()
    # the change from the old scales, so that empty groups keep theirs
    change = torch.linalg.solve(A, b.double() - (A @ old[..., None])[..., 0])
    scale = grid.storable((old + change).float())

    def error(scales: Tensor) -> Tensor:
        D = V * grid.stretch(scales.float(), columns) - T
        return ((D @ H) * D).sum(1)

    better = error(scale) < error(grid.scale)
    return replace(grid, scale=torch.where(better[:, None], scale, grid.scale))
