"""A model whose residual stream and heads have other coordinates, and is otherwise the same.

Gains of the norms are first taken into the matrices that read them, because a rotation does not
commute with them. Which matrices read and write the stream is guessed from what wires say: readers
come after a norm, and writers are the other matrices of a layer whose rows are as many as the
stream is wide. The guess is proven on random weights before it is used. A LayerNorm takes the mean
of the channels away: with it the rotation must keep the mean as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from compress.errors import ModelError, RecipeError
from compress.heads import Head, find_heads
from compress.order import check_untied
from compress.recipe import Stage
from compress.source import Source
from compress.store import Part
from compress.weights import Dense
from compress.wiring import Probe, Wire, find_wires, same

Rotation = Callable[[int], Tensor]  # width → orthogonal float64 [width, width]


@dataclass(frozen=True)
class Stream:
    """What stands at the residual stream of a model, and how it is turned.

    norms    wires of every block from a norm to what reads it
    heads    of every block
    readers  sites whose columns are coordinates of the stream: after a norm, and embeddings
    writers  sites whose rows are
    R        float64 [width, width]
    """

    norms: list[tuple[Wire, ...]]
    heads: list[tuple[Head, ...]]
    readers: frozenset[str]
    writers: frozenset[str]
    R: Tensor

    def turn(self, number: int, part: Part, rotation: Rotation) -> None:
        """Write the coordinates x of block ``number`` as x·R, and those of its heads likewise."""
        for wire in self.norms[number]:
            absorb(part, wire)
            self._turn_bias(part, wire.producer.rpartition(".")[0])
        for name, weight in part.weights.items():
            W = weight.dense().double()
            if name in self.readers:
                part.weights[name] = Dense.of(W @ self.R, weight.dtype)
            elif name in self.writers:
                part.weights[name] = Dense.of(self.R.T @ W, weight.dtype)
                self._turn_bias(part, name)
        for head in self.heads[number]:
            head.turn(part, rotation(head.size))

    def _turn_bias(self, part: Part, module: str) -> None:
        bias = part.others.get(f"{module}.bias")
        if bias is not None:
            part.others[f"{module}.bias"] = (bias.double() @ self.R).to(bias.dtype)


def absorb(part: Part, wire: Wire) -> None:
    """Give the gain of a norm to the columns of its readers; its bias is divided by it.

    Raises:
        ModelError: a channel has no gain, and a bias.
    """
    norm = part.others[wire.producer]
    name = wire.producer.rpartition(".")[0]
    gain = norm.float() + int(wire.unit)
    part.others[wire.producer] = torch.full_like(norm, 1 - int(wire.unit))
    bias = part.others.get(f"{name}.bias")
    if bias is not None:
        divided = torch.where(bias == 0, 0.0, bias.float() / gain)
        if not divided.isfinite().all():
            raise ModelError(f"{name}: a channel with gain 0 and a bias cannot be turned")
        part.others[f"{name}.bias"] = divided.to(bias.dtype)
    for site in wire.readers:
        weight = part.weights[site.name]
        part.weights[site.name] = Dense.of(weight.dense() * gain, weight.dtype)


def find_stream(source: Source, rotation: Rotation, *, heads: bool) -> Stream:
    """The residual stream of a model that stays the same when it is turned, with its ``heads``.

    Raises:
        ModelError: the head is tied to the embedding, or the model does not stay the same.
    """
    name = source.model_class.__name__
    sites = source.anatomy.sites
    R = rotation(width(source))
    check_untied(source.anatomy)
    wires = find_wires(source)
    norms = [tuple(wire for wire in here if wire.site is None) for here in wires]
    readers = {reader.name for here in norms for wire in here for reader in wire.readers}
    readers |= {s.name for s in sites if s.layout == "embedding" and s.shape[1] == len(R)}
    writers = {s.name for s in sites if s.shape[0] == len(R) and s.layout != "embedding"} - readers
    probe = Probe(source)
    found: list[tuple[Head, ...]] = [() for _ in wires]
    if heads:
        found = probe.visit(lambda number, part, run: find_heads(wires[number], part, run))
    stream = Stream(norms, found, frozenset(readers), frozenset(writers), R)
    before = probe.output()
    for turned in (stream, replace(stream, R=keeping_mean(R))):
        after = probe.output(change=partial(turned.turn, rotation=rotation))
        if same(before, after):
            return turned
    raise ModelError(
        f"{name}: turning its residual stream changes what it puts out; rotations are for "
        "models with a norm before every matrix that reads the stream"
    )


def takes_all(stage: Stage, stream: Stream, source: Source) -> None:
    """Refuse a stage that leaves out some of what stands at the stream.

    Raises:
        RecipeError: with the name of one.
    """
    missed = (stream.readers | stream.writers) - {s.name for s in stage.sites(source.anatomy)}
    if missed:
        raise RecipeError(
            f"{stage.use} turns the whole model, and {min(missed)} is not among its targets"
        )


def keeping_mean(R: Tensor) -> Tensor:
    """The rotation R, then the reflection after which the mean of x·R is that of x."""
    ones = torch.ones(len(R), dtype=R.dtype)
    normal = ones @ R - ones
    if normal.norm() < 1e-9:
        return R
    return R - 2 * torch.outer(R @ normal, normal) / normal.square().sum()


def width(source: Source) -> int:
    """How wide the stream is.

    Raises:
        ModelError: the model embeds no tokens.
    """
    table = next((s for s in source.anatomy.sites if s.role == "embed"), None)
    if table is None:
        raise ModelError(f"{source.model_class.__name__}: no token embedding to turn was found")
    return table.shape[1]
