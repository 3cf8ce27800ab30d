"""What a compressed model is worth: the size of a dense model that predicts as well.

The ladder's own level is not the original's: it saw other text, and fewer or more tokens. In
L = E + A/N^α + B/D^β tokens only add a constant, so the ladder's curve is moved up or down until
the original lies on it, and what counts is the *difference* to the original, which is measured
paired and exactly:

    L(N_eq) − L(N₀) = ΔL        N_eq = (N₀^−α + ΔL / A)^(−1/α)        for a law

That is true as far as the gain from parameters is the same at the original's tokens as at the
ladder's. In measurements, models that saw more tokens gain somewhat more from parameters, so that a
ladder trained on fewer tokens than the original calls a loss somewhat more parameters than it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from eval.scaling.law import Curve


@dataclass(frozen=True)
class Equivalent:
    """Parameters of a dense model as good as a compressed one."""

    original: int
    """Parameters of the dense original."""
    parameters: float | None
    """None where the ladder does not reach: see ``limits``."""
    stderr: float | None
    low: float
    """Lower end of the 95% interval, no lower than the ladder reaches."""
    high: float
    limits: tuple[float, float]

    @property
    def share(self) -> float | None:
        """Of the original's parameters."""
        return None if self.parameters is None else self.parameters / self.original

    @property
    def text(self) -> str:
        """``1.2M ± 0.1M``"""
        if self.parameters is None or self.stderr is None:
            low, high = self.limits
            beyond = self.high <= low
            return f"less than {count(low)}" if beyond else f"more than {count(high)}"
        unit, size = _unit(self.parameters)
        places = max(0, min(4, 1 - math.floor(math.log10(max(self.stderr / size, 1e-9)))))
        return f"{self.parameters / size:.{places}f}{unit} ± {self.stderr / size:.{places}f}{unit}"

    def sentence(self, bytes_share: float) -> str:
        """``worth a dense model of 1.2M ± 0.1M parameters: 0.83 of itself for 0.28 of …``"""
        text = f"worth a dense model of {self.text} parameters"
        if self.share is not None:
            text += f": {self.share:.2f} of itself for {bytes_share:.2f} of the bytes"
        return text


def equivalent(
    curve: Curve, original: int, loss: float, stderr: float, *, seed: int = 0
) -> Equivalent:
    """The parameters N at which ``curve`` has lost ``loss`` nats/token since ``original``.

    The interval is that of the curve's draws and of ``loss``, whose standard error is ``stderr``.
    """
    base, bases = curve.nll(original)
    noise = np.random.default_rng(seed).standard_normal(len(bases))
    found, draws = curve.parameters(base + loss, bases + loss + stderr * noise)
    low, high = np.clip(np.percentile(draws, [2.5, 97.5], method="nearest"), *curve.limits)
    if not curve.limits[0] <= found <= curve.limits[1]:
        end = curve.limits[0] if found < curve.limits[0] else curve.limits[1]
        return Equivalent(original, None, None, end, end, curve.limits)
    spread = float(np.clip(draws, *curve.limits).std())
    return Equivalent(original, found, spread, float(low), float(high), curve.limits)


def count(N: float) -> str:
    """``1.44M``: three significant digits, in thousands, millions or billions."""
    unit, size = _unit(N)
    return f"{N / size:.3g}{unit}"


def _unit(N: float) -> tuple[str, float]:
    units = (("B", 1e9), ("M", 1e6), ("k", 1e3))
    return next(((unit, size) for unit, size in units if abs(N) >= 0.9995 * size), ("", 1.0))
