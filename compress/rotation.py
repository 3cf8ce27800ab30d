"""A model whose residual stream has other coordinates, and is otherwise the same.

Gains of the norms are first taken into the matrices that read them, because a rotation does not
commute with them. Which matrices read and write the stream is guessed from what wires say: readers
come after a norm, and writers are the other matrices of a layer whose rows are as many as the
stream is wide. The guess is proven on random weights before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import ModelError
from compress.source import Source
from compress.store import Part
from compress.weights import Dense
from compress.wiring import Probe, Wire, find_wires, same


@dataclass(frozen=True)
class Stream:
    """What stands at the residual stream of a model.

    norms    wires of every block from a norm to what reads it
    readers  sites whose columns are coordinates of the stream: after a norm, and embeddings
    writers  sites whose rows are
    """

    norms: list[tuple[Wire, ...]]
    readers: frozenset[str]
    writers: frozenset[str]

    def turn(self, number: int, part: Part, R: Tensor) -> None:
        """Write the coordinates x of block ``number`` as x·R; R float64 [width, width]."""
        for wire in self.norms[number]:
            absorb(part, wire)
        for name, weight in part.weights.items():
            W = weight.dense().double()
            if name in self.readers:
                W = W @ R
            elif name in self.writers:
                W = R.T @ W
                bias = part.others.get(f"{name}.bias")
                if bias is not None:
                    part.others[f"{name}.bias"] = (bias.double() @ R).to(bias.dtype)
            else:
                continue
            part.weights[name] = Dense.of(W, weight.dtype)


def absorb(part: Part, wire: Wire) -> None:
    """Give the gain of a norm to the columns of its readers."""
    norm = part.others[wire.producer]
    gain = norm.float() + int(wire.unit)
    part.others[wire.producer] = torch.full_like(norm, 1 - int(wire.unit))
    for site in wire.readers:
        weight = part.weights[site.name]
        part.weights[site.name] = Dense.of(weight.dense() * gain, weight.dtype)


def find_stream(source: Source, R: Tensor) -> Stream:
    """The residual stream of a model that stays the same when it is turned by R.

    Raises:
        ModelError: the head is tied to the embedding, or the model does not stay the same.
    """
    name = source.model_class.__name__
    sites = source.anatomy.sites
    tied = next((site for site in sites if site.aliases), None)
    if tied is not None:
        raise ModelError(
            f"{name}: {tied.aliases[0]} reads the table of {tied.name}, and a rotation gives the "
            "two different ones; set untie: true in the recipe"
        )
    norms = [tuple(w for w in wires if w.site is None) for wires in find_wires(source)]
    readers = {reader.name for wires in norms for wire in wires for reader in wire.readers}
    readers |= {s.name for s in sites if s.layout == "embedding" and s.shape[1] == len(R)}
    writers = {s.name for s in sites if s.shape[0] == len(R) and s.layout != "embedding"} - readers
    stream = Stream(norms, frozenset(readers), frozenset(writers))
    probe = Probe(source)
    turned = probe.output(change=lambda number, part: stream.turn(number, part, R))
    if not same(probe.output(), turned):
        raise ModelError(
            f"{name}: turning its residual stream changes what it puts out; rotations are for "
            "models with an RMSNorm before every matrix that reads the stream"
        )
    return stream


def width(source: Source) -> int:
    """How wide the stream is.

    Raises:
        ModelError: the model embeds no tokens.
    """
    table = next((s for s in source.anatomy.sites if s.role == "embed"), None)
    if table is None:
        raise ModelError(f"{source.model_class.__name__}: no token embedding to turn was found")
    return table.shape[1]
