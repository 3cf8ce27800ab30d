"""Bits shared out between matrices whose codes are entropy-coded: one step size for all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from compress.compressors.quantization.steps import ZERO, entropy

FINE = 4  # step sizes a doubling at which entropies are known
ABOVE, BELOW = 3, 6  # doublings around the spread of the weights
SAMPLE = 1 << 18  # weights of a matrix whose entropy tells that of all
LEAST, MOST = 0.5, 6.0  # bits a weight
HALVINGS = 50


@dataclass(frozen=True)
class Rate:
    """Bits a weight of one matrix of ``count`` weights, by log₂ of the step size s, in quarters."""

    name: str
    count: int
    bits: dict[int, float]

    @classmethod
    def of(cls, name: str, weights: Tensor) -> Rate:
        """``weights`` are in steps for s = 1."""
        flat = weights.flatten()
        flat = flat[:: -(-len(flat) // SAMPLE)]
        middle = round(FINE * float(flat.square().mean().sqrt().clamp(min=1e-30).log2()))
        bits = {}
        for t in range(middle - BELOW * FINE, middle + ABOVE * FINE):
            bits[t] = entropy((flat / 2 ** (t / FINE)).round_().clamp_(-ZERO, ZERO - 1))
        return cls(name, weights.numel(), bits)

    def at(self, t: float, least: float) -> float:
        """For s = 2^(t/4), between the known ones in proportion; from ``least`` to ``MOST``."""
        t = min(max(t, min(self.bits)), max(self.bits) - 1e-9)
        below = int(t // 1)
        bits = self.bits[below] + (t - below) * (self.bits[below + 1] - self.bits[below])
        return min(max(bits, least), MOST)


def share_out(rates: Iterable[Rate], average: float) -> dict[str, float]:
    """Bits of every matrix at the one s for which all weights together take ``average``.

    What the code needs beyond the entropy is not known yet: each is to fit into what it gets.
    """
    known, least = list(rates), min(LEAST, average)
    whole = sum(rate.count for rate in known)
    low, high = float(min(min(r.bits) for r in known)), float(max(max(r.bits) for r in known))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if sum(rate.count * rate.at(middle, least) for rate in known) > average * whole:
            low = middle
        else:
            high = middle
    shares = {rate.name: rate.at(high, least) for rate in known}
    over = sum(rate.count * shares[rate.name] for rate in known) / whole - average
    return {name: share - over if least < share < MOST else share for name, share in shares.items()}
