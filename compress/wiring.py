"""Which channels of a model can be scaled without changing it, found out by trying.

A *wire* is a tensor that some sites read and one module makes: a norm, or another site whose
output goes on channel by channel (up_proj to down_proj, v_proj to o_proj). Then column j of the
readers can be multiplied by s_j, and the channel of the producer that it comes from divided by it.

No architecture is described here. Every block is run once with random weights, and again with each
candidate's channels multiplied by numbers that spell out the channel's own number, one digit a
run. A site whose every input comes back multiplied by such a number reads that channel; then a
random scale is folded into both ends, and what the block puts out must stay as it was. The folds
of all blocks together must leave the model's output as it was. What fails is not a wire.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compress.anatomy import Block, Site
from compress.blockwise import fill, streamed
from compress.errors import ModelError
from compress.plain_load import make_inputs
from compress.source import Source
from compress.store import Part
from compress.verify import probe_inputs
from compress.weights import Dense

ROWS = 4  # sequences in the probe
DIGITS = 1.1 + 0.06 * torch.arange(16)  # a channel's factor; 1 would look like no wire at all
SAME = 1e-3  # relative difference of what is the same up to rounding in float32

T = TypeVar("T")
Run = Callable[[Part], tuple[Tensor, dict[str, Tensor]]]  # → output, and what each site read


@dataclass(frozen=True)
class Wire:
    """A tensor on its way from one module to the sites that read it.

    producer  the tensor whose entries (a norm's weight) or rows (a site's) scale the channels
    source    int64 [in]: the entry or row that makes input j of the readers
    site      the producer as a site; None for a norm
    unit      whether the norm multiplies by 1 + weight (Gemma) instead of by weight
    """

    readers: tuple[Site, ...]
    producer: str
    source: Tensor
    site: Site | None = None
    unit: bool = False

    def pooled(self, x: Tensor) -> Tensor:
        """[in] → [in], the mean over inputs that come from the same channel (grouped heads)."""
        _, group = self.source.unique(return_inverse=True)
        total = torch.zeros(int(group.max()) + 1, dtype=x.dtype).index_add_(0, group, x)
        return (total / group.bincount())[group]


def fold(part: Part, wire: Wire, scale: Tensor) -> None:
    """Multiply the columns of the readers in ``part`` by ``scale`` [in], divide their producer.

    Inputs of one channel have one scale. The readers get what the producer's dtype made of it, so
    that a norm in 16 bits loses nothing.
    """
    name, source, one = wire.producer, wire.source, int(wire.unit)
    bias = f"{name.rpartition('.')[0]}.bias"
    if wire.site is None:
        old = part.others[name].float() + one
        new = old.clone()
        new[source] = old[source] / scale
        part.others[name] = (new - one).to(part.others[name].dtype)
        stored = part.others[name].float() + one
        scale = torch.where(stored[source] == 0, scale, old[source] / stored[source])
    else:
        rows = part.weights[wire.site.name].dense().clone()
        rows[source] = rows[source] / scale[:, None]
        part.weights[wire.site.name] = Dense.of(rows, part.weights[wire.site.name].dtype)
    if bias in part.others:
        shifted = part.others[bias].float().clone()
        shifted[source] = shifted[source] / scale
        part.others[bias] = shifted.to(part.others[bias].dtype)
    for site in wire.readers:
        weight = part.weights[site.name]
        part.weights[site.name] = Dense.of(weight.dense() * scale, weight.dtype)


def find_wires(source: Source) -> list[tuple[Wire, ...]]:
    """The wires of every block of the model's anatomy, those outside of layers first.

    Raises:
        ModelError: scales that leave every block as it was change the model.
    """
    probe, blocks = Probe(source), source.anatomy.blocks
    found = probe.visit(lambda number, part, run: search(blocks[number], part, run))
    if not same(probe.output(), probe.output(found)):
        raise ModelError(
            f"{source.model_class.__name__}: its blocks share more than what passes from one to "
            "the next, so no channel of it can be scaled safely"
        )
    return found


class Probe:
    """The architecture of a model with random weights, a block in memory at a time."""

    def __init__(self, source: Source) -> None:
        self.source, self.anatomy = source, source.anatomy
        self.skeleton = source.new_skeleton()
        self.shapes = {n: t.shape for n, t in self.skeleton.named_parameters()}
        spec = probe_inputs(self.skeleton)
        for entry in spec.values():
            entry["shape"] = [ROWS, *entry["shape"][1:]]
        self.inputs: dict[str, Any] = dict(make_inputs(spec))
        if "use_cache" in inspect.signature(self.skeleton.forward).parameters:
            self.inputs |= {"use_cache": False}

    def part(self, number: int) -> Part:
        """Random weights of a block, the same whenever asked; outputs about as large as inputs."""
        block, random = self.anatomy.blocks[number], torch.Generator().manual_seed(number)
        sites = {site.parameter: site for site in block.sites}
        part = Part({}, {})
        for name in block.tensors:
            site = sites.get(name)
            if site is not None:
                fan = 1 if site.layout == "embedding" else site.shape[1]
                matrix = torch.randn(site.shape, generator=random) / fan**0.5
                part.weights[site.name] = Dense.of(matrix)
            elif name in self.shapes:
                shape = self.shapes[name]
                tensor = torch.randn(shape, generator=random) / shape[1:].numel() ** 0.5
                if name.endswith("bias"):  # small: no channel may be on the dead side of a ReLU
                    tensor = tensor / 10
                elif len(shape) < 2:  # gains are all away from zero
                    tensor = tensor.sigmoid() + 0.5
                part.others[name] = tensor
        return part

    @torch.no_grad()
    def output(
        self,
        wires: list[tuple[Wire, ...]] | None = None,
        change: Callable[[int, Part], None] | None = None,
    ) -> Tensor:
        """What the model puts out, every wire scaled at random, or its parts changed."""

        def read(number: int) -> Part:
            part = self.part(number)
            for wire in wires[number] if wires else ():
                fold(part, wire, _scale(wire))
            if change is not None:
                change(number, part)
            return part

        with streamed(self.skeleton, self.anatomy, read, torch.float32) as model:
            return _first(model(**self.inputs))

    @torch.no_grad()
    def output_of(self, other: Source, read: Callable[[int], Part]) -> Tensor | None:
        """What another model puts out with the parts that ``read`` gives; None if it cannot run."""
        try:
            with streamed(other.new_skeleton(), other.anatomy, read, torch.float32) as model:
                return _first(model(**self.inputs))
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError):  # sizes do not fit
            return None

    @torch.no_grad()
    def visit(self, find: Callable[[int, Part, Run], Iterator[T]]) -> list[tuple[T, ...]]:
        """What ``find`` finds in every block, given its number, its weights and a way to run it."""
        blocks = self.anatomy.blocks
        found: list[tuple[T, ...]] = [()] * len(blocks)

        def enter(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                if not found[number]:
                    part = self.part(number)
                    run = self._runner(number, part, lambda: module.forward(*args, **kwargs))
                    found[number] = tuple(find(number, part, run))

            return hook

        with streamed(self.skeleton, self.anatomy, self.part, torch.float32) as model:
            handles = [
                model.get_submodule(block.name).register_forward_pre_hook(
                    enter(number), with_kwargs=True
                )
                for number, block in enumerate(blocks[1:], start=1)
            ]
            model(**self.inputs)
            for handle in handles:
                handle.remove()
            part = self.part(0)
            run = self._runner(0, part, lambda: model(**self.inputs))
            found[0] = tuple(find(0, part, run))
        return found

    def _runner(self, number: int, own: Part, forward: Callable[[], Any]) -> Run:
        """Runs ``forward`` with other weights in block ``number``, and restores its own."""
        block = self.anatomy.blocks[number]

        def run(part: Part) -> tuple[Tensor, dict[str, Tensor]]:
            read: dict[str, Tensor] = {}

            def keep(name: str) -> Callable[..., None]:
                return lambda _, args: read.update({name: args[0].flatten(0, -2)}) if args else None

            handles = [
                self.skeleton.get_submodule(site.name).register_forward_pre_hook(keep(site.name))
                for site in block.sites
                if site.layout != "embedding"
            ]
            fill(self.skeleton, self.anatomy, block, part, torch.float32)
            output = _first(forward())
            fill(self.skeleton, self.anatomy, block, own, torch.float32)
            for handle in handles:
                handle.remove()
            return output, read

        return run


def search(block: Block, part: Part, run: Run) -> Iterator[Wire]:
    """The wires of one block. ``run`` gives its output and what its sites read."""
    before, inputs = run(part)
    for wire in candidates(block, part):
        readers = _readers(wire, part, inputs, run)
        maps = list(readers.values())
        if not maps or any(not torch.equal(source, maps[0]) for source in maps):
            continue
        sites = tuple(site for site in block.sites if site.name in readers)
        if any(site.aliases for site in sites):  # tied modules may read something else
            continue
        whole = Wire(sites, wire.producer, maps[0], wire.site, wire.unit)
        scaled = copied(part)
        fold(scaled, whole, _scale(whole))
        if same(before, run(scaled)[0]):
            yield whole


def candidates(block: Block, part: Part) -> Iterator[Wire]:
    """What may make a tensor that sites read, ``source`` being the channels that it would have.

    Of a fused projection the last rows are tried: half of them (gate and up), a third (query, key
    and value), or as many as values have when queries are as wide as the input.
    """
    for name, tensor in part.others.items():
        if name.endswith(".weight") and tensor.dim() == 1:
            for unit in (False, True):
                yield Wire((), name, torch.arange(len(tensor)), None, unit)
    for site in block.sites:
        if site.layout == "embedding" or site.aliases:
            continue
        rows, columns = site.shape
        sizes = (rows, rows // 2, rows // 3, (rows - columns) // 2)
        for size in sorted({n for n in sizes if n > 1}, reverse=True):
            yield Wire((), site.parameter, torch.arange(rows - size, rows), site)


def _readers(wire: Wire, part: Part, inputs: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
    """Sites all of whose inputs are channels of the producer → which, int64 [in]."""
    numbers = torch.arange(len(wire.source))
    readers = {name: torch.zeros(x.shape[1], dtype=torch.long) for name, x in inputs.items()}
    place = 1
    while readers and place < len(numbers):
        changed = copied(part)
        fold(changed, wire, 1 / DIGITS[numbers // place % 16])
        now = run(changed)[1]
        for name in list(readers):
            digit = _digits(inputs[name], now[name]) if name in now else None
            if digit is None:
                del readers[name]
            else:
                readers[name] += place * digit
        place *= 16
    return {
        name: wire.source[number]
        for name, number in readers.items()
        if int(number.max()) < len(numbers)
    }


def _digits(before: Tensor, now: Tensor) -> Tensor | None:
    """The digit by whose factor each column [tokens, in] was multiplied, if all were by one."""
    if before.shape != now.shape:
        return None
    factor = (before * now).sum(0) / before.square().sum(0)
    digit = (factor[:, None] - DIGITS).abs().argmin(1)
    wrong = (now - before * DIGITS[digit]).norm(dim=0)
    return digit if bool((wrong < SAME * now.norm(dim=0)).all()) else None  # < refuses zeros


def _scale(wire: Wire) -> Tensor:
    """Random scales [in] between 1/2 and 2, one a channel."""
    random = torch.Generator().manual_seed(len(wire.source))
    return 2 ** wire.pooled(2 * torch.rand(len(wire.source), generator=random) - 1)


def copied(part: Part) -> Part:
    """A part whose entries can be replaced."""
    return Part(dict(part.weights), dict(part.others))


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are equal up to rounding."""
    return one.shape == other.shape and bool((one - other).norm() <= SAME * one.norm())


def _first(output: Any) -> Tensor:
    """The first tensor that a module puts out."""
    return output if isinstance(output, Tensor) else output[0]
