"""What a matrix may become, what it then takes, and what it costs the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from compress.anatomy import Site


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

    sizes   int64 [options], bytes, ascending
    costs   float64 [options], nats a token, descending
    """

    name: str
    options: list[Option]
    sizes: Tensor
    costs: Tensor

    @classmethod
    def of(cls, site: Site, rows: list[tuple[int, float, Option]]) -> Choices:
        """Of options with their bytes and costs, and of leaving the matrix alone."""
        rows = [row for row in rows if row[0] < site.nbytes] + [(site.nbytes, 0.0, Option())]
        kept: list[tuple[int, float, Option]] = []
        for row in sorted(rows, key=lambda row: row[:2]):
            if not kept or row[1] < kept[-1][1]:
                kept.append(row)
        sizes, prices, options = zip(*kept, strict=True)
        return cls(site.name, list(options), torch.tensor(sizes), torch.tensor(prices).double())

    @property
    def largest(self) -> Option:
        """The one of most bytes that is not the matrix as it is; that, if there is no other."""
        return self.options[max(len(self.options) - 2, 0)]
