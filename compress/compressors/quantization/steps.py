"""Uniform grids without end: a step for every weight, and what their codes cost once coded.

Where codes are entropy-coded, their range costs nothing and a grid needs no groups: the best
quantizer at a rate is the uniform one, whose step says how much error is bought for how many bits
(Gish and Pierce 1968).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.weights import Coded
from compress.weights.modeling_compressed import steps

ZERO, TOP = 2048, 4095  # far enough that nothing is cut off, near enough for exact float32 sums
TRIES = 12  # at the step that gives a number of bytes


@dataclass(frozen=True)
class Steps:
    """The step of weight (i, j) is ``step`` · 2^((row_i − 128)/8) · 2^((column_j − 128)/8).

    row uint8 [out], column uint8 [in].
    """

    step: float
    row: Tensor
    column: Tensor
    top: int = TOP

    @classmethod
    def of(cls, row: Tensor, column: Tensor) -> Steps:
        """The nearest to steps row_i · column_j, both float32 and positive."""
        rows, columns = row.double().log2(), column.double().log2()
        middle = rows.mean() + columns.mean()

        def eighths(x: Tensor) -> Tensor:
            return ((x - x.mean()) * 8 + 128).round().clamp(0, 255).to(torch.uint8)

        return cls(float(middle.exp2()), eighths(rows), eighths(columns))

    def sizes(self) -> Tensor:
        """float32 [out, in]."""
        return steps({"step": self.step}, self.row, self.column)

    def spread(self, columns: int) -> tuple[Tensor, Tensor]:
        """Step and zero-point of every weight, float32 [out, in]."""
        sizes = self.sizes()
        return sizes, torch.full_like(sizes, ZERO)

    def codes(self, W: Tensor) -> Tensor:
        """The nearest codes of W [out, in], int32."""
        return (W / self.sizes()).round_().add_(ZERO).clamp_(0, TOP).int()

    def coded(self, codes: Tensor, dtype: torch.dtype) -> Coded:
        return Coded.of(codes.int() - ZERO, self.row, self.column, self.step, dtype)


def entropy(codes: Tensor) -> float:
    """Bits a code, by the frequencies of ``codes``, small integers."""
    counts = torch.bincount((codes - codes.min()).flatten().int()).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum())


def within(make: Callable[[float], Coded], start: float, nbytes: int) -> Coded:
    """The weight of the smallest step found whose bytes are at most ``nbytes``.

    ``make`` gives the weight for a factor on all steps, ``start`` is the factor to begin with.
    """
    factor, below, above = start, None, None  # factors whose weights are too large, and are not
    best: Coded | None = None
    for number in range(TRIES):
        found = make(factor)
        bits = 8 * (found.nbytes - nbytes) / (found.shape[0] * found.shape[1])
        if bits > 0:
            below = factor
        else:
            best, above = (found, factor) if above is None or factor < above else (best, above)
            if bits > -0.01:
                break
        # doubling a step saves about a bit, but less where most codes are zero
        doublings = bits if best is not None else max(bits, min(2.0, bits * (1 + number)))
        guess = factor * 2.0 ** (doublings + (0.004 if bits > 0 else 0.002))
        if below is not None and above is not None and not below < guess < above:
            guess = (below * above) ** 0.5
        factor = guess
    return found if best is None else best
