"""A budget of bytes, shared out between matrices so that the sum of their errors is small."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from compress.sizes import parse_size

STEPS = 60  # of the bisection: more than float64 can tell apart


class Budget(BaseModel):
    """What a stage's settings are chosen for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: str = Field(description="of the whole weight file: 30% of the original's, or 300MB")
    families: list[str] = Field(
        default_factory=list,
        description="methods to choose from: quantization, low-rank, pruning, residual; the "
        "stage's own, unless given; and depth and width, which come before",
    )

    @field_validator("size")
    @classmethod
    def _a_size(cls, size: str) -> str:
        parse_size(size, 1e12)
        return size


def allocate(options: Sequence[tuple[Tensor, Tensor]], budget: int) -> list[int]:
    """Choose one option for every matrix, within ``budget`` bytes in all.

    ``options`` holds for each matrix (bytes, error), both [options], bytes ascending and errors
    descending. For a price μ of a byte each matrix takes the least error + μ·bytes, which is the
    least total error for the bytes that it comes to (Everett 1963). The lowest price that stays
    within the budget is found by bisection; what is left then buys the steps that pay best. When
    even the smallest options exceed the budget, these are chosen.
    """
    sizes = [size.double() for size, _ in options]
    errors = [error.double() for _, error in options]
    cheapest = max((float(error.max()) for error in errors), default=0.0)  # at which price all save

    def at(price: float) -> list[int]:
        return [int((e + price * s).argmin()) for s, e in zip(sizes, errors, strict=True)]

    def total(chosen: list[int]) -> float:
        return sum(float(s[c]) for s, c in zip(sizes, chosen, strict=True))

    high, low = 2 * cheapest, cheapest * 1e-20
    chosen = at(high)
    for _ in range(STEPS):
        middle = (high * low) ** 0.5
        cheaper = at(middle)
        if total(cheaper) <= budget:
            high, chosen = middle, cheaper
        else:
            low = middle
    return _spend(sizes, errors, chosen, budget - total(chosen))


def by_table(
    options: Sequence[tuple[Tensor, Tensor]], budget: int, buckets: int = 1 << 13
) -> list[int] | None:
    """As ``allocate``, by dynamic programming: no hull, so large matrices need not jump.

    Bytes are counted in ``buckets`` of the room above the smallest options, rounded up, so it is
    the best choice but for this rounding; what that leaves unused is spent. None without room.
    """
    sizes, errors = [s.double() for s, _ in options], [e.double() for _, e in options]
    room = budget - sum(float(s[0]) for s in sizes)
    if room <= 0:
        return None
    extra = [((s - s[0]) * buckets / room).ceil().long() for s in sizes]
    best = torch.zeros(buckets + 1, dtype=torch.float64)  # least error within so many buckets
    taken = []
    for more, error in zip(extra, errors, strict=True):
        tries = torch.full((len(more), buckets + 1), torch.inf, dtype=torch.float64)
        for n, (step, e) in enumerate(zip(more.tolist(), error.tolist(), strict=True)):
            if step <= buckets:
                tries[n, step:] = best[: buckets + 1 - step] + e
        best, which = tries.min(0)
        taken.append(which.to(torch.uint8))
    at, chosen = buckets, []
    for more, which in zip(reversed(extra), reversed(taken), strict=True):
        chosen.append(int(which[at]))
        at -= int(more[chosen[-1]])
    chosen.reverse()
    spent = sum(float(s[c]) for s, c in zip(sizes, chosen, strict=True))
    return _spend(sizes, errors, chosen, budget - spent)


def least_cost(options: Sequence[tuple[Tensor, Tensor]], budget: int) -> float:
    """A bound: no choice within ``budget`` bytes has a smaller sum of errors (Lagrange's dual).

    max over prices μ ≥ 0 of Σ min (error + μ·bytes) − μ·budget, which is concave in μ.
    """
    sizes = [size.double() for size, _ in options]
    errors = [error.double() for _, error in options]
    most = max((float(error.max()) for error in errors), default=0.0)
    prices = torch.logspace(-20, 0.5, 400, dtype=torch.float64) * most

    def dual(price: float) -> float:
        least = sum(float((e + price * s).min()) for s, e in zip(sizes, errors, strict=True))
        return least - price * budget

    values = [dual(float(price)) for price in prices]
    at = max(range(len(values)), key=values.__getitem__)
    low, high = float(prices[max(at - 1, 0)]), float(prices[min(at + 1, len(values) - 1)])
    for _ in range(STEPS):
        third = (high - low) / 3
        if dual(low + third) < dual(high - third):
            low += third
        else:
            high -= third
    return max(0.0, dual(low), *values)


def _spend(sizes: list[Tensor], errors: list[Tensor], chosen: list[int], left: float) -> list[int]:
    """Take the step that lowers the error most for its bytes, until none fits into ``left``."""
    while True:
        best, step = 0.0, (0, 0)
        for i, (size, error, c) in enumerate(zip(sizes, errors, chosen, strict=True)):
            extra = size[c + 1 :] - size[c]
            gain = (error[c] - error[c + 1 :]) / extra
            gain = gain.masked_fill(extra > left, 0)
            if len(gain) and float(gain.max()) > best:
                best, step = float(gain.max()), (i, c + 1 + int(gain.argmax()))
        if best == 0:
            return chosen
        i, option = step
        left -= float(sizes[i][option] - sizes[i][chosen[i]])
        chosen[i] = option
