"""The options that each method has for a matrix, and what each would cost.

A few are really solved, in the model as it is; they share the moments of the inputs and their
factorization. Between them costs are interpolated in their logarithm, where they are nearly
straight: a bit more a weight quarters an error.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from compress import registry
from compress.anatomy import Site
from compress.compressors.base import CalibratedCompressor
from compress.compressors.lowrank.gptq_residual import GPTQResidual
from compress.compressors.lowrank.svd import SVD
from compress.compressors.quantization.bits import WIDTHS, cost
from compress.compressors.quantization.ecgptq import ECGPTQ
from compress.compressors.quantization.gptq_sparse import GPTQSparse
from compress.compressors.quantization.packed import PackedIntegers
from compress.errors import RecipeError
from compress.planning.cache import digest
from compress.planning.options import Option
from compress.problem import LayerProblem
from compress.weights import Coded, Dense, LowRank, Masked, Quantized, Sparse, Sum, Weight
from compress.weights.base import spec_of
from compress.weights.quantized import scale_dtype

Group: TypeAlias = int | Literal["channel"]
Costs: TypeAlias = Mapping[str, float]  # what was tried, by its option's label

GROUPS: tuple[Group, ...] = (32, 64, 128, "channel")
REFERENCE = 64  # the group in which every number of bits is tried
TRIED = (2, 4)  # bits at which every group is tried; between and beyond, its factor is inferred
FAMILIES = {
    "quantization": ("gptq", "ecgptq"),
    "low-rank": ("svd",),
    "pruning": ("admm", "gptq_sparse"),
    "residual": ("gptq_residual",),
}


class Menu(ABC):
    """What one method, with the parameters that all its options share, can make of a matrix."""

    axes: ClassVar[frozenset[str]]  # parameters that an option sets

    def __init__(self, solver: CalibratedCompressor) -> None:
        self.solver = solver
        shared = solver.model_dump(mode="json", exclude=set(self.axes))
        self.key = f"{solver.name}-{digest(shared)}"

    def of(self, option: Option) -> CalibratedCompressor:
        """The compressor that makes it."""
        return self.solver.model_copy(update=option.fields)

    @abstractmethod
    def knots(self, site: Site) -> list[Option]:
        """The options that are tried."""

    @abstractmethod
    def options(self, site: Site, costs: Costs) -> Iterator[tuple[Option, float]]:
        """Every option, with its cost by those of the knots."""

    @abstractmethod
    def weight(self, site: Site, option: Option) -> Weight:
        """One of the size that this option makes, on the meta device."""

    def costs(self, problem: LayerProblem, site: Site) -> dict[str, float]:
        """What each of the knots costs, tried, by its label."""
        return {o.label: cost(problem, self.quick(o).compress(problem)) for o in self.knots(site)}

    def quick(self, option: Option) -> CalibratedCompressor:
        """The compressor without polish, which lowers all costs alike."""
        made = self.of(option)
        polishes = "polish" in type(made).model_fields
        return made.model_copy(update={"polish": 0}) if polishes else made


class Grids(Menu):
    """gptq: bits × group."""

    axes = frozenset({"bits", "group"})
    dividing = False  # whether groups must divide the width

    def groups(self, site: Site) -> list[Group]:
        """Groups narrower than the matrix, and the whole row."""
        width = site.shape[1]
        narrower = [g for g in GROUPS if isinstance(g, int) and g < width]
        return [*(g for g in narrower if not (self.dividing and width % g)), "channel"]

    def reference(self, site: Site) -> Group:
        groups = self.groups(site)
        return REFERENCE if REFERENCE in groups else groups[-1]

    def knots(self, site: Site) -> list[Option]:
        """All bits in one group, two in each."""
        base = self.reference(site)
        wanted = [grid(b, base) for b in WIDTHS]
        return wanted + [grid(b, g) for g in self.groups(site) if g != base for b in TRIED]

    def options(self, site: Site, costs: Costs) -> Iterator[tuple[Option, float]]:
        """What a group of scales is worth depends little on the bits, and is known at both ends."""
        base = self.reference(site)
        for group in self.groups(site):
            pairs = [(costs[grid(b, group).label], costs[grid(b, base).label]) for b in TRIED]
            ends = [_log(own) - _log(other) for own, other in pairs]
            for bits in WIDTHS:
                way = min(1.0, max(0.0, (bits - TRIED[0]) / (TRIED[1] - TRIED[0])))
                factor = math.exp(ends[0] + way * (ends[1] - ends[0]))
                yield grid(bits, group), costs[grid(bits, base).label] * factor

    def weight(self, site: Site, option: Option) -> Quantized:
        return packed(self.of(option), site)


class Pairs(Menu):
    """A method with bits and a second parameter; all options are tried."""

    second: ClassVar[str]
    pairs: ClassVar[tuple[tuple[int, float], ...]]

    def knots(self, site: Site) -> list[Option]:
        if site.layout not in self.solver.layouts:
            return []
        return [Option.of(self.solver.name, bits=b, **{self.second: x}) for b, x in self.pairs]

    def options(self, site: Site, costs: Costs) -> Iterator[tuple[Option, float]]:
        for option in self.knots(site):
            yield option, costs[option.label]


class Corrected(Pairs):
    """gptq_residual: bits in groups of 64, factors of ¼, ½ and 1 bit a weight."""

    axes = frozenset({"bits", "ratio"})
    second = "ratio"
    pairs = tuple((bits, ratio) for bits in (2, 3, 4) for ratio in (1 / 64, 1 / 32, 1 / 16))

    def weight(self, site: Site, option: Option) -> Sum:
        solver, (rows, columns) = self.of(option), site.shape
        assert isinstance(solver, GPTQResidual)
        rank = solver.rank_of(site.shape)
        left, right = (torch.empty(n, device="meta") for n in ((rows, rank), (rank, columns)))
        return Sum.of(packed(solver, site), LowRank.of(left, right, site.dtype))


class Thinned(Pairs):
    """gptq_sparse: the bits of what stays, and the share that goes."""

    axes = frozenset({"bits", "sparsity"})
    second = "sparsity"
    pairs = ((2, 0.7), (2, 0.5), (3, 0.7), (3, 0.5))

    def weight(self, site: Site, option: Option) -> Masked:
        solver, (rows, columns) = self.of(option), site.shape
        assert isinstance(solver, GPTQSparse)
        grid, kept = packed(solver.rounding, site), solver.kept(site.shape)
        words = torch.empty(1, -(-kept * solver.bits // 32), dtype=torch.int32, device="meta")
        tensors = {
            "mask": _bytes(rows * -(-columns // 8)).view(rows, -1),
            "weight_packed": words,
            "weight_scale": grid.tensors["weight_scale"],
        }
        return Masked(
            spec_of("masked", torch.empty(site.shape, device="meta"), site.dtype), tensors
        )


class Line(Menu):
    """A method with one parameter that says how much is kept."""

    axis: ClassVar[str]
    values: ClassVar[tuple[float, ...]]
    tried: ClassVar[tuple[float, ...]]  # of ``values``, both ends among them

    def knots(self, site: Site) -> list[Option]:
        if site.layout not in self.solver.layouts:
            return []
        return [self.option(v) for v in self.tried]

    def options(self, site: Site, costs: Costs) -> Iterator[tuple[Option, float]]:
        known = [(v, costs[self.option(v).label]) for v in self.tried if self.knots(site)]
        known = [(v, c) for v, c in known if c < math.inf]
        for value in self.values:
            if known and known[0][0] <= value <= known[-1][0]:
                yield self.option(value), between(known, value)

    def option(self, value: float) -> Option:
        return Option.of(self.solver.name, **{self.axis: value})


class Codes(Line):
    """ecgptq: eighths of a bit; the smallest file for its loss, decoded as it loads."""

    axes = frozenset({"bits"})
    axis = "bits"
    values = tuple(n / 8 for n in range(2, 49))
    tried = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.5, 6.0)

    def costs(self, problem: LayerProblem, site: Site) -> dict[str, float]:
        """Between steps that are tried; infinite where the matrix is too small for so few bits."""
        assert isinstance(self.solver, ECGPTQ)
        known = self.solver.trials(problem)
        return {
            self.option(bits).label: between(known, bits) if bits >= known[0][0] else math.inf
            for bits in self.tried
        }

    def weight(self, site: Site, option: Option) -> Coded:
        """Its stream may take a few bytes fewer: it is made to fit."""
        rows, columns = site.shape
        whole = self.of(option).predict(site.shape, site.dtype)
        stream = torch.empty(max(0, whole - rows - columns), dtype=torch.uint8, device="meta")
        tensors = {"stream": stream, "row": _bytes(rows), "column": _bytes(columns)}
        return Coded(spec_of("coded", torch.empty(site.shape, device="meta"), site.dtype), tensors)


class Ranks(Line):
    """svd: the share of the bytes that factors keep."""

    axes = frozenset({"ratio"})
    axis = "ratio"
    values = tuple(n / 20 for n in range(1, 20))
    tried = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)

    def weight(self, site: Site, option: Option) -> Weight:
        solver, (rows, columns) = self.of(option), site.shape
        assert isinstance(solver, SVD)
        rank = solver.rank_of(site.shape, site.dtype)
        if rank is None:
            return Dense.of(torch.empty(site.shape, dtype=site.dtype, device="meta"))
        left, right = torch.ones(rows, rank), torch.ones(rank, columns)
        if not solver.pivoted:
            return LowRank.of(left, right, site.dtype)
        apart = (left if rows <= columns else right.T).bool()  # all but the pivots' identity
        apart[:rank] = torch.eye(rank, dtype=torch.bool)
        if rows <= columns:
            sparse = Sparse.of(left, apart, site.dtype)
            return LowRank.join(sparse, Dense.of(right, site.dtype), site.dtype)
        sparse = Sparse.of(right, apart.T.contiguous(), site.dtype)
        return LowRank.join(Dense.of(left, site.dtype), sparse, site.dtype)


class Zeros(Line):
    """admm: the share of the weights that go; pays where the file holds masks (compact storage)."""

    axes = frozenset({"sparsity"})
    axis = "sparsity"
    values = tuple(n / 20 for n in range(2, 19))
    tried = (0.1, 0.3, 0.5, 0.7, 0.9)

    def weight(self, site: Site, option: Option) -> Sparse:
        rows, columns = site.shape
        kept = rows * columns - round(option.fields["sparsity"] * rows * columns)
        spec = spec_of("sparse", torch.empty(rows, columns, device="meta"), site.dtype)
        tensors = {
            "values": torch.empty(kept, dtype=site.dtype, device="meta"),
            "mask": torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device="meta"),
        }
        return Sparse(spec, tensors)


MENUS: dict[str, type[Menu]] = {
    "gptq": Grids, "ecgptq": Codes, "svd": Ranks, "admm": Zeros, "gptq_residual": Corrected,
    "gptq_sparse": Thinned,
}  # fmt: skip
# What their options do not set. No share is given out: a plan says what each site gets.
PLAIN: dict[str, dict[str, Any]] = {"svd": {"ranks": "uniform"}, "admm": {"allocation": "uniform"}}


def methods_of(families: Iterable[str]) -> list[str]:
    """The methods of some families.

    Raises:
        RecipeError: there is no such family.
    """
    for family in families:
        if family not in FAMILIES:
            known = ", ".join((*FAMILIES, "depth", "width"))
            raise RecipeError(f"families: {family}: choose among {known}")
    return [method for family in families for method in FAMILIES[family]]


def menus_of(methods: Iterable[str], own: CalibratedCompressor | None = None) -> dict[str, Menu]:
    """A menu for each method; ``own`` is the one whose parameters are known.

    Raises:
        RecipeError: a method does not go by a size.
    """
    found: dict[str, Menu] = {}
    for method in methods:
        if method not in MENUS:
            raise RecipeError(f"{method} does not go by a size; {', '.join(MENUS)} do")
        solver = own
        if own is None or own.name != method:
            made = registry.get(method).model_validate({})
            assert isinstance(made, CalibratedCompressor)
            solver = made
        assert solver is not None
        found[method] = MENUS[method](solver.model_copy(update=PLAIN.get(method, {})))
    return found


def fast(option: Option) -> bool:
    """Whether the packed runtime computes with it faster than with the matrix as it is."""
    known = option.fields
    if option.use == "gptq":
        return known["bits"] <= 4 or (known["bits"], known["group"]) == (8, "channel")
    return option.use in ("svd", "gptq_sparse")  # of which the latter runs as gptq's


def packed(solver: CalibratedCompressor, site: Site) -> Quantized:
    """A weight of the size that a method with these bits and group packs, on the meta device."""
    assert isinstance(solver, PackedIntegers)
    assert isinstance(solver.bits, int)
    rows, columns = site.shape
    group = columns if solver.group == "channel" else min(solver.group, columns)
    scales = torch.zeros(rows, -(-columns // group))
    made = Quantized.pack(
        torch.zeros(rows, columns, dtype=torch.uint8),
        scales.to(scale_dtype(site.dtype)),
        None if solver.symmetric else scales,
        bits=solver.bits,
        group=group,
        dtype=site.dtype,
    )
    return Quantized(made.spec, {k: t.to("meta") for k, t in made.tensors.items()})


def grid(bits: int, group: Group) -> Option:
    return Option.of("gptq", bits=bits, group=group)


def between(known: Sequence[tuple[float, float]], at: float) -> float:
    """The cost at some value, from (value, cost) in ascending order, straight in its logarithm."""
    above = next((n for n, (value, _) in enumerate(known) if value >= at), len(known) - 1)
    (low, first), (high, last) = known[max(above - 1, 0)], known[max(above, 1)]
    return math.exp(_log(first) + (at - low) / (high - low) * (_log(last) - _log(first)))


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="meta")


def _log(x: float) -> float:
    return math.log(max(x, 1e-30))
