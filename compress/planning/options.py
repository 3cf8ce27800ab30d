"""What a matrix may become: bits and a group, or left alone; and what each costs the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from compress.anatomy import Site
from compress.compressors.quantization.bits import WIDTHS, cost
from compress.compressors.quantization.gptq import GPTQ
from compress.problem import LayerProblem

Group: TypeAlias = int | Literal["channel"]

GROUPS: tuple[Group, ...] = (32, 64, 128, "channel")
REFERENCE = 64  # the group in which every number of bits is tried
TRIED = (2, 4)  # bits at which every group is tried; between and beyond, its factor is inferred


@dataclass(frozen=True)
class Option:
    """``bits`` a weight, and how many inputs share a scale; None leaves the matrix as it is."""

    bits: int | None = None
    group: Group = "channel"

    @property
    def label(self) -> str:
        if self.bits is None:
            return "–"
        return f"{self.bits}/{'row' if self.group == 'channel' else self.group}"

    def of(self, gptq: GPTQ) -> GPTQ:
        return gptq.model_copy(update={"bits": self.bits, "group": self.group})


Settings: TypeAlias = Mapping[str, Option]


def groups_of(site: Site, *, dividing: bool = False) -> list[Group]:
    """Groups narrower than the matrix, and the whole row; ``dividing`` its width, if asked."""
    width = site.shape[1]
    return [
        g
        for g in GROUPS
        if g == "channel" or (isinstance(g, int) and g < width and not (dividing and width % g))
    ]


def reference(groups: list[Group]) -> Group:
    return REFERENCE if REFERENCE in groups else groups[-1]


def tried(problem: LayerProblem, gptq: GPTQ, groups: list[Group]) -> dict[str, float]:
    """Costs of the options that are really rounded, by label: all bits in one group, two in each.

    All of them share the moments of the inputs and their factorization.
    """
    base = reference(groups)
    wanted = [Option(b, base) for b in WIDTHS]
    wanted += [Option(b, g) for g in groups if g != base for b in TRIED]
    return {
        option.label: cost(problem, option.of(gptq).trial(problem, option.bits or 0))
        for option in wanted
    }


def filled(costs: Mapping[str, float], groups: list[Group]) -> dict[Option, float]:
    """Costs of every option: a group's factor between ``TRIED`` is interpolated in its logarithm.

    What a group of scales is worth depends little on the bits, and is known at both ends.
    """
    base, found = reference(groups), {}
    for group in groups:
        factor = [
            math.log(max(costs[Option(b, group).label], 1e-30))
            - math.log(max(costs[Option(b, base).label], 1e-30))
            for b in TRIED
        ]
        for bits in WIDTHS:
            way = min(1.0, max(0.0, (bits - TRIED[0]) / (TRIED[1] - TRIED[0])))
            change = factor[0] + way * (factor[1] - factor[0])
            found[Option(bits, group)] = costs[Option(bits, base).label] * math.exp(change)
    return found


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
    def of(cls, site: Site, gptq: GPTQ, costs: Mapping[Option, float]) -> Choices:
        """Of every option with its exact bytes, and of leaving the matrix alone."""
        rows = [
            (option.of(gptq).size(site.shape, site.dtype, option.bits or 0), price, option)
            for option, price in costs.items()
        ]
        rows = [row for row in rows if row[0] < site.nbytes] + [(site.nbytes, 0.0, Option())]
        kept: list[tuple[int, float, Option]] = []
        for row in sorted(rows, key=lambda row: row[:2]):
            if not kept or row[1] < kept[-1][1]:
                kept.append(row)
        sizes, prices, options = zip(*kept, strict=True)
        return cls(site.name, list(options), torch.tensor(sizes), torch.tensor(prices).double())
