"""What a planner answers with: a recipe, the size of its file, and what it should cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from compress.compressors.base import StructureCompressor
from compress.planning.options import Option
from compress.recipe import Recipe

WHY = "# Settings: each byte went where the loss's gradients say that it saves most.\n"


@dataclass(frozen=True)
class Plan:
    """A recipe that is predicted to fit.

    settings  the option of every matrix that the stage takes, by name
    bytes     of the weight file that it makes, exactly; with entropy-coded integers at most
    budget    bytes that were given
    cost      Σ ½ tr(F D H Dᵀ) of the trials, nats a token; and the KL of another shape before it
    gap       share of Σ by which the best choice may be better, at most (Lagrange's bound)
    predicted KL to the original in nats a token, and the ends of its 95% interval, if measured
    next      what 1% more of the original's bytes is predicted to take off the KL
    measured  KL and its standard error once applied, on calibration text that was not read
    """

    recipe: Recipe
    settings: dict[str, Option]
    bytes: int
    budget: int
    cost: float
    gap: float
    format: str
    predicted: tuple[float, float, float] | None = None
    next: float | None = None
    measured: tuple[float, float] | None = None

    @property
    def expected(self) -> float:
        """KL in nats a token as far as it is known: measured, predicted, or by costs alone."""
        return (self.measured or self.predicted or (self.cost,))[0]

    @property
    def shape(self) -> str:
        """What is done to the model's shape; nothing if that stays."""
        made = (stage.compressor for stage in self.recipe.stages)
        return " → ".join(c.summary() for c in made if isinstance(c, StructureCompressor))

    def lines(self, original: int) -> list[str]:
        """What there is to say of it; ``original`` is the bytes of the model's own file."""
        said = [
            f"model     {original:,} → {self.bytes:,} bytes ({self.bytes / original:.1%}), "
            f"{1 - self.bytes / self.budget:.2%} below the size; held by: {self.format}",
            f"options   {self.gap:.2%} above the least possible sum of costs, at most",
        ]
        if self.shape:
            said.append(f"shape     {self.shape}, before all else")
        if self.predicted:
            kl, low, high = self.predicted
            said.append(
                f"predicted KL {kl:.4f} nats a token ({low:.4f} to {high:.4f} in 95 of 100): "
                f"{math.exp(-kl):.2%} of the quality"
            )
            said.append(f"next      1% more of the bytes buys about {self.next or 0:.2g} nats")
        else:
            said.append(
                f"costs     about {self.cost:.3g} nats a token; plans like it were not measured"
            )
        if self.measured:
            kl, error = self.measured
            said.append(
                f"measured  KL {kl:.4f} ± {error:.4f} on calibration text that was not read"
            )
        return said

    def numbers(self) -> dict[str, Any]:
        """The same as JSON holds it."""
        return {
            "bytes": self.bytes,
            "budget": self.budget,
            "cost": self.cost,
            "gap": self.gap,
            "format": self.format,
            "shape": self.shape,
            "predicted": self.predicted,
            "next": self.next,
            "measured": self.measured,
            "settings": {n: {"use": o.use} | o.fields for n, o in self.settings.items() if o.use},
        }

    def to_yaml(self, original: int) -> str:
        """The recipe, with the reasons above it."""
        above = "".join(f"# {line}\n" for line in self.lines(original))
        return f"{above}{WHY}{self.recipe.to_yaml()}"
