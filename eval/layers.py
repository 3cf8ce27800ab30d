"""Where in the model the errors are, and where the bytes: a grid of layer × role per checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from eval.chart import bytes_text
from eval.measured import Measured


@dataclass(frozen=True)
class Cell:
    """One role in one block. ``heat`` is its place on the colour scale, 0 to 1."""

    heat: float
    text: str


@dataclass(frozen=True)
class Strip:
    """One role across the blocks; a site outside the blocks is a single cell."""

    role: str
    cells: list[Cell | None]
    outside: bool


@dataclass(frozen=True)
class Grid:
    """All strips of one checkpoint for one quantity."""

    title: str
    low: str
    """What the cold end of the colour scale means."""
    high: str
    kind: str
    strips: list[Strip]


@dataclass(frozen=True)
class Layers:
    """A checkpoint's grids."""

    name: str
    blocks: list[int]
    grids: list[Grid]


def layers(checkpoints: Sequence[Measured]) -> list[Layers]:
    """The grids of every checkpoint that recorded its sites; one error scale for all."""
    errors = [
        site["relative_error"]
        for checkpoint in checkpoints
        for site in checkpoint.final_sites
        if site.get("relative_error")
    ]
    ends = (min(errors), max(errors)) if errors else None
    found = []
    for checkpoint in checkpoints:
        sites = checkpoint.final_sites
        if not sites:
            continue
        blocks = sorted({site["block"] for site in sites if site["block"] is not None})
        grids = [_bytes_grid(sites, blocks)]
        if ends and any(site.get("relative_error") is not None for site in sites):
            grids.insert(0, _error_grid(sites, blocks, *ends))
        found.append(Layers(checkpoint.name, blocks, grids))
    return found


def _error_grid(
    sites: list[dict[str, Any]], blocks: list[int], lowest: float, highest: float
) -> Grid:
    def cell(group: list[dict[str, Any]]) -> Cell | None:
        errors = [s["relative_error"] for s in group if s.get("relative_error") is not None]
        if not errors:
            return None
        error = max(errors)
        span = math.log(highest / lowest)
        heat = math.log(error / lowest) / span if error > 0 and span > 0 else 0.0
        return Cell(heat, f"relative error {error:.3g}")

    strips = _strips(sites, blocks, cell)
    return Grid("Relative error", f"{lowest:.2g}", f"{highest:.2g}", "error", strips)


def _bytes_grid(sites: list[dict[str, Any]], blocks: list[int]) -> Grid:
    def cell(group: list[dict[str, Any]]) -> Cell | None:
        after = sum(site["bytes"] for site in group)
        before = sum(site["bytes_before"] or 0 for site in group)
        share = after / before if before else 1.0
        text = f"{bytes_text(after)} of {bytes_text(before)} ({share:.0%})"
        return Cell(min(share, 1.0), text)

    return Grid("Bytes kept", "0%", "100%", "bytes", _strips(sites, blocks, cell))


def _strips(sites: list[dict[str, Any]], blocks: list[int], cell: Any) -> list[Strip]:
    strips = []
    for role in _in_order(site["role"] for site in sites):
        mine = [site for site in sites if site["role"] == role]
        inside = [[s for s in mine if s["block"] == block] for block in blocks]
        outside = [site for site in mine if site["block"] is None]
        if any(inside):
            cells = [cell(group) if group else None for group in inside]
            strips.append(Strip(role, cells, outside=False))
        if outside:
            strips.append(Strip(role, [cell(outside)], outside=True))
    return sorted(strips, key=lambda strip: strip.outside)


def _in_order(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
