"""How training went: loss and held-out loss by step, a small picture per stage that trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.measured import Measured

WIDTH, HEIGHT = 320, 120  # of the picture, in its own units
Points = list[tuple[float, float]]  # step, nats a token


@dataclass(frozen=True)
class Curve:
    """One training stage of one checkpoint; ``loss`` and ``held`` are SVG point lists."""

    name: str
    stage: str
    loss: str
    held: str
    best: tuple[float, float]
    """Where the kept step lies in the picture."""
    low: str
    high: str
    steps: int
    told: str
    """The same in words."""


def curves(checkpoints: Sequence[Measured]) -> list[Curve]:
    """Every stage whose training was recorded and took a step, checkpoint by checkpoint."""
    return [
        _curve(checkpoint.name, stage)
        for checkpoint in checkpoints
        for stage in checkpoint.record.get("stages", [])
        if len(stage.get("curve", [])) > 1
    ]


def _curve(name: str, stage: dict[str, Any]) -> Curve:
    loss, held = (
        [(p["step"], p[key]) for p in stage["curve"] if math.isfinite(p.get(key, math.nan))]
        for key in ("loss", "held")
    )
    values = [value for _, value in loss + held] or [0.0]
    ends = min(values), max(values)
    steps, best = stage["steps"], stage["best_step"]
    kept = next((point for point in held if point[0] == best), (best, ends[0]))
    losses = stage["held_out_loss"]
    return Curve(
        name=name,
        stage=stage["use"],
        loss=_line(loss, steps, ends),
        held=_line(held, steps, ends),
        best=_place(*kept, steps, ends),
        low=f"{ends[0]:.3g}",
        high=f"{ends[1]:.3g}",
        steps=steps,
        told=f"held-out loss {losses['before']:.4g} → {losses['best']:.4g} nats a token, "
        f"best after {best} of {steps} steps",
    )


def _line(points: Points, steps: int, ends: tuple[float, float]) -> str:
    places = [_place(*point, steps, ends) for point in points]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _place(step: float, value: float, steps: int, ends: tuple[float, float]) -> tuple[float, float]:
    """Pixels of a point; the highest loss is at the top."""
    low, high = ends
    return WIDTH * step / steps, HEIGHT * (high - value) / ((high - low) or 1.0)
