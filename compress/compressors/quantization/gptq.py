"""Rounding that makes up for itself: GPTQ on the best grid, then coordinate descent."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from compress.compressors.base import PROPAGATE, CalibratedCompressor
from compress.compressors.quantization.grid import CHUNK, Grid
from compress.compressors.quantization.packed import PackedIntegers
from compress.compressors.quantization.rtn import RTN
from compress.compressors.quantization.steps import Steps
from compress.moments import Moments
from compress.problem import LayerProblem
from compress.weights import Quantized, Weight

QUIET = np.errstate(all="ignore")  # what is not finite is refused later, by the site's name
BLOCK = 64  # inputs whose errors are carried on one by one before the rest learn of them


class GPTQ(PackedIntegers, CalibratedCompressor):
    """Round the inputs one after another, each time moving the rest to make up (arXiv 2210.17323).

    Inputs come in descending order of H_jj, on a grid searched before. Then ``polish`` rounds of
    coordinate descent (q_j ← round(q_j − E_j/H_jj), E = (Ŵ − T)H) and of the least-squares scales
    for the codes as they are; every step of that lowers tr((T − Ŵ) H (T − Ŵ)ᵀ). Of a pruned weight
    the zeros stay zeros, whose errors the others make up for, too.
    """

    plans_tables: ClassVar = True

    propagate: float = Field(0.75, ge=0, le=1, description=PROPAGATE)
    polish: int = Field(
        4,
        ge=0,
        description="rounds of coordinate descent and scale refit, fewer if one gains under 1%",
    )

    @property
    def reads_gradients(self) -> bool:
        return self.loss_weighted or not isinstance(self.bits, int)

    def trial(self, problem: LayerProblem, bits: int) -> Weight:
        return self.model_copy(update={"bits": bits, "polish": 0}).compress(problem)

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
            grid, after = refit_scales(codes, T, grid, moments)
            if after > 0.99 * wrong:
                break
            wrong = after
        return self.pack(codes, grid, problem)


@QUIET
def round_with_feedback(
    T: Tensor, grid: Grid | Steps, moments: Moments, keep: Tensor | None = None
) -> Tensor:
    """Codes [out, in] of GPTQ: each rounding error is spread over the inputs to come.

    They are uint8, or int32 if the grid has more. Where ``keep`` (bool [out, in]) is false the code
    is the zero-point. One input is a few short vectors, for which numpy takes less time than torch.
    """
    order, U = moments.inverse_factor()
    W, s, z = (_inputs(x.T[order]) for x in (T, *grid.spread(T.shape[1])))
    kept = None if keep is None else _inputs(keep.T[order])
    per_step, pulls = 1 / s, _inputs(U.T)
    codes, errors = np.empty_like(W), np.empty_like(W[:BLOCK])
    for start in range(0, len(W), BLOCK):
        end = min(start + BLOCK, len(W))
        for i, j in enumerate(range(start, end)):
            w = W[j] - _combined(errors[:i], pulls[j, start:j])
            code = _nearest(w * per_step[j] + z[j], grid.top)
            if kept is not None:
                code = np.where(kept[j], code, z[j])
            codes[j] = code
            errors[i] = (w - (code - z[j]) * s[j]) / pulls[j, j]
        W[end:] -= _product(pulls[end:, start:end], errors[: end - start])
    kind = torch.uint8 if grid.top < 256 else torch.int32
    return torch.from_numpy(codes)[order.argsort()].T.to(kind)


@QUIET
def descend(
    codes: Tensor, T: Tensor, grid: Grid, moments: Moments, keep: Tensor | None = None
) -> Tensor:
    """One sweep of coordinate descent over the inputs: the best code of each, the others fixed.

    Codes where ``keep`` (bool [out, in]) is false stay.
    """
    H = _inputs(moments.damped)
    s, z, q, W = (_inputs(x.T) for x in (*grid.spread(T.shape[1]), codes, T))
    kept = None if keep is None else _inputs(keep.T)
    D = (q - z) * s - W  # Ŵ − T
    per_step = -1 / (H.diagonal()[:, None] * s)
    moves = np.empty_like(W[:BLOCK])
    for start in range(0, len(H), BLOCK):
        end = min(start + BLOCK, len(H))
        E = _product(H[start:end], D)
        for i, j in enumerate(range(start, end)):
            slope = E[i] + _combined(moves[:i], H[j, start:j])
            code = _nearest(slope * per_step[j] + q[j], grid.top)
            if kept is not None:
                code = np.where(kept[j], code, q[j])
            moves[i] = (code - q[j]) * s[j]
            q[j] = code
        D[start:end] += moves[: end - start]
    return torch.from_numpy(q).T.to(torch.uint8)


def _inputs(x: Tensor) -> np.ndarray:
    """A copy [in, …] in which an input's row is one piece; in float32, but bools as they are."""
    kind = x.dtype if x.dtype == torch.bool else torch.float32
    return x.to(kind, copy=True, memory_format=torch.contiguous_format).numpy()


def _combined(rows: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Σ_k shares_k rows_k. Torch multiplies: numpy's threads would be in the way of its own."""
    return torch.mv(torch.from_numpy(rows).T, torch.from_numpy(shares)).numpy()


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return torch.mm(torch.from_numpy(a), torch.from_numpy(b)).numpy()


def _nearest(x: np.ndarray, top: int) -> np.ndarray:
    """Rounded to codes from 0 to ``top``, in place."""
    np.rint(x, out=x)
    np.maximum(x, 0, out=x)
    return np.minimum(x, top, out=x)


def refit_scales(codes: Tensor, T: Tensor, grid: Grid, moments: Moments) -> tuple[Grid, float]:
    """The scales of least error for ``codes``, rows where storage rounding made it worse kept.

    A row's output is Σ_g s_g v_g with v_g = (codes − zero) in group g and 0 elsewhere, so the best
    change δ of its scales solves V H Vᵀ δ = −V H Dᵀ with D = Ŵ − T, one small system a row. Also
    returns tr((Ŵ − T)(H + λI)(Ŵ − T)ᵀ), what is left.
    """
    H = moments.damped.float()
    step = max(1, CHUNK // T.shape[1])
    parts = [
        _refit_rows(codes[i : i + step], T[i : i + step], grid.rows(i, i + step), H)
        for i in range(0, len(T), step)
    ]
    scales, left = zip(*parts, strict=True)
    return replace(grid, scale=torch.cat(scales)), sum(left)


def _refit_rows(codes: Tensor, T: Tensor, grid: Grid, H: Tensor) -> tuple[Tensor, float]:
    """Of some rows, the scales [rows, groups] and what is left."""
    rows, columns = T.shape
    groups = grid.scale.shape[1]
    V = codes.float() - grid.spread(columns)[1]
    D = grid.values(codes) - T
    pad = groups * grid.group - columns

    def by_group(X: Tensor) -> Tensor:
        X = torch.nn.functional.pad(X, (0, pad)) if pad else X
        return X.view(rows, -1, grid.group).sum(-1)

    A = torch.empty(rows, groups, groups)
    for g in range(groups):
        start = g * grid.group
        own = slice(start, start + grid.group)
        pairs = by_group((V[:, own] @ H[own, start:]) * V[:, start:])
        A[:, g, g:] = A[:, g:, g] = pairs
    E = D @ H
    slope, wrong = by_group(V * E).double(), (D * E).sum(1).double()
    A = A.double()
    ridge = 1e-6 * A.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    bent = A + ridge[:, None, None] * torch.eye(groups, dtype=torch.float64)
    old = grid.scale.double()
    scale = grid.storable((old - torch.linalg.solve(bent, slope)).float())
    change = scale.double() - old
    gain = (change * (2 * slope + (A @ change[..., None])[..., 0])).sum(1)
    better = gain < 0
    left = (wrong + gain.clamp(max=0)).sum().item()
    return torch.where(better[:, None], scale, grid.scale), left
