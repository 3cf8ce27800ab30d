"""What a matrix may become, what it then takes, and what it costs the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from compress.anatomy import Site
from compress.compressors.budget import allocate, by_table


@dataclass(frozen=True)
class Option:
    """A method and the parameters that make this option; no method leaves the matrix as it is."""

    use: str = ""
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, use: str, **settings: Any) -> Option:
        return cls(use, tuple(settings.items()))

    @property
    def fields(self) -> dict[str, Any]:
        return dict(self.settings)

    @property
    def label(self) -> str:
        """Short enough for a table, and one for each option."""
        known = self.fields
        if "group" in known:
            return f"{known['bits']}/{'row' if known['group'] == 'channel' else known['group']}"
        if "bits" in known and "ratio" in known:
            return f"{known['bits']}+{known['ratio']:.1%}"
        if "bits" in known and "sparsity" in known:
            return f"{known['bits']}, {known['sparsity']:.0%} zero"
        if "bits" in known:
            return f"{known['bits']:g}"
        if "ratio" in known:
            return f"rank {known['ratio']:.0%}"
        return f"{known['sparsity']:.0%} zero" if known else "–"


Settings: TypeAlias = Mapping[str, Option]


@dataclass(frozen=True)
class Choices:
    """The options of one matrix of which none is both larger and worse than another.

    Of several that get the same one (``anatomy.joined``): bytes and costs are theirs together.

    sizes   int64 [options], bytes, ascending
    costs   float64 [options], nats a token, descending
    """

    names: tuple[str, ...]
    options: list[Option]
    sizes: Tensor
    costs: Tensor

    @classmethod
    def of(cls, sites: list[Site], rows: Iterable[tuple[int, float, Option]]) -> Choices:
        """Of options with their bytes and costs, and of leaving the matrix alone."""
        whole = sum(site.nbytes for site in sites)
        rows = [row for row in rows if row[0] < whole] + [(whole, 0.0, Option())]
        kept: list[tuple[int, float, Option]] = []
        for row in sorted(rows, key=lambda row: row[:2]):
            if not kept or row[1] < kept[-1][1]:
                kept.append(row)
        sizes, prices, options = zip(*kept, strict=True)
        names = tuple(site.name for site in sites)
        return cls(names, list(options), torch.tensor(sizes), torch.tensor(prices).double())

    @property
    def largest(self) -> int:
        """The place of the one of most bytes that is not the matrix as it is, if there is one."""
        return max(len(self.options) - 2, 0)


def settings_of(chosen: Iterable[tuple[Choices, int]]) -> dict[str, Option]:
    """The option of every matrix, by the places in the choices."""
    return {name: c.options[i] for c, i in chosen for name in c.names}


def cheapest(choices: Sequence[Choices], budget: int) -> list[int]:
    """The places of least cost within ``budget`` bytes.

    The better of what prices and a table find; either can miss by its rounding.
    """
    options = [(c.sizes, c.costs) for c in choices]
    found = [allocate(options, budget)]
    if table := by_table(options, budget):
        found.append(table)

    def total(chosen: list[int]) -> float:
        return sum(float(c.costs[i]) for c, i in zip(choices, chosen, strict=True))

    return min(found, key=total)
