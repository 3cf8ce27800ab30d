"""The quantization grid: a scale and a zero-point per group, chosen to minimise the error.

Definition, for a group of weights w with importance h (the diagonal of H):

    ŵ = s · (clip(round(w/s) + z, 0, 2^b − 1) − z),   minimise Σ h (ŵ − w)²

over s and an integer z (symmetric: z = 2^(b−1), and s may be negative, so that the longer arm of
the grid points to the longer tail). The range is searched from 0.3 of the group's own up to where
both tails fit, coarsely and then finely around the best; a least-squares refit of s closes. Scales
are rounded to their storage dtype *before* weights are rounded, so what is measured is what is
stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

LEAST, STEP = 0.3, 0.05  # share of a group's range that the coarse search begins with, and its step
FINE = torch.linspace(-0.04, 0.04, 5)
CHUNK = 3 << 16  # weights looked at together: few enough for the cache, and below 1 MB


@dataclass(frozen=True)
class Grid:
    """scale [out, groups] in its storage dtype; zero [out, groups] float, integer-valued."""

    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    symmetric: bool

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def codes(self, W: Tensor) -> Tensor:
        """Nearest grid points of W [out, in], as integers in [0, 2^bits)."""
        s, z = self.spread(W.shape[1])
        return self.round(W, s, z).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """float32 [out, in] that ``codes`` stand for."""
        s, z = self.spread(codes.shape[1])
        return (codes.float() - z) * s

    def spread(self, columns: int) -> tuple[Tensor, Tensor]:
        """Scale and zero-point of every weight, float32 [out, columns]."""
        return self.stretch(self.scale.float(), columns), self.stretch(self.zero, columns)

    def stretch(self, X: Tensor, columns: int) -> Tensor:
        """One number a group → one a weight."""
        return X.repeat_interleave(self.group, 1)[:, :columns]

    def rows(self, start: int, end: int) -> Grid:
        """The grid of some rows."""
        return replace(self, scale=self.scale[start:end], zero=self.zero[start:end])

    def round(self, W: Tensor, s: Tensor, z: Tensor) -> Tensor:
        """Nearest codes, still float, of weights with scales s and zero-points z."""
        return _round(W, s, z, self.bits)

    def storable(self, scale: Tensor) -> Tensor:
        """Scales in the dtype of storage; one that would vanish becomes 1."""
        return _storable(scale, self.scale.dtype).to(self.scale.dtype)


def search_grid(
    W: Tensor, h: Tensor, *, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> Grid:
    """The grid for W [out, in] with input importance h [in] (ones without data).

    ``group`` inputs of a row share a scale; the last group of a row may be shorter. ``dtype`` is
    the dtype that scales are stored in.
    """
    rows, columns = W.shape
    group = min(group, columns)
    count = -(-columns // group)
    pad = count * group - columns
    padded = torch.nn.functional.pad(W.float(), (0, pad)).view(rows, count, group)
    weight = torch.nn.functional.pad(h.float(), (0, pad)).view(1, count, group)
    step = max(1, CHUNK // (count * group))
    parts = [
        _search(padded[start : start + step], weight, bits, symmetric, dtype)
        for start in range(0, rows, step)
    ]
    scale, zero = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return Grid(scale.to(dtype), zero, bits, group, symmetric)


def _search(
    W: Tensor, h: Tensor, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """scale and zero [rows, groups] for W [rows, groups, group]."""
    top = 2**bits - 1
    low, high = W.amin(-1).clamp(max=0), W.amax(-1).clamp(min=0)
    middle = torch.full_like(low, 2.0 ** (bits - 1))
    best = _Best(W, h, bits, dtype)

    def attempt(r: Tensor) -> None:
        if symmetric:
            reach = torch.maximum(-low, high) / 2 ** (bits - 1)
            best.offer(r * reach, middle, r)
            best.offer(-r * reach, middle, r)
            return
        scale = r * (high - low) / top
        centre = top / 2 - (high + low) / 2 / scale.clamp(min=1e-30)
        for zero in (centre.floor(), centre.floor() + 1):
            best.offer(scale, zero.clamp(0, top), r)

    most = 2 ** (bits - 1) / (2 ** (bits - 1) - 1) if symmetric else 1.0
    for r in torch.linspace(LEAST, most, 1 + round((most - LEAST) / STEP)).tolist():
        attempt(torch.full_like(low, r))
    around = best.ratio
    for change in FINE.tolist():
        if change:
            attempt(around + change)
    best.refit()
    best.refit()
    return best.scale, best.zero


class _Best:
    """The best scale and zero-point offered so far, group by group."""

    def __init__(self, W: Tensor, h: Tensor, bits: int, dtype: torch.dtype) -> None:
        self.W, self.h, self.bits, self.dtype = W, h, bits, dtype
        self.scale = torch.ones_like(W[..., 0])
        self.zero = torch.zeros_like(self.scale)
        self.ratio = torch.ones_like(self.scale)
        self.error = torch.full_like(self.scale, torch.inf)

    def offer(self, scale: Tensor, zero: Tensor, ratio: Tensor) -> None:
        scale = _storable(scale, self.dtype)
        s, z = scale.unsqueeze(-1), zero.unsqueeze(-1)
        values = _round(self.W, s, z, self.bits).sub_(z).mul_(s)
        error = values.sub_(self.W).square_().mul_(self.h).sum(-1)
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.ratio = torch.where(better, ratio, self.ratio)
        self.error = torch.where(better, error, self.error)

    def refit(self) -> None:
        """s = Σ h w (q − z) / Σ h (q − z)², the least-squares scale of the codes as they are."""
        s, z = self.scale.unsqueeze(-1), self.zero.unsqueeze(-1)
        steps = _round(self.W, s, z, self.bits) - z
        below = (self.h * steps.square()).sum(-1)
        scale = (self.h * self.W * steps).sum(-1) / below.clamp(min=1e-30)
        self.offer(torch.where(below > 0, scale, self.scale), self.zero, self.ratio)


def _round(W: Tensor, s: Tensor, z: Tensor, bits: int) -> Tensor:
    return (W / s).round_().add_(z).clamp_(0, 2**bits - 1)


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As it will be read back; a scale that would vanish (a group of zeros) becomes 1."""
    limit = torch.finfo(dtype)
    rounded = scale.clamp(-limit.max, limit.max).to(dtype).float()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)
