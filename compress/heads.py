"""Channels that only mix with one another on their way from one site to another: those of a head.

What attention does to values it does to all channels of a head alike, so v_proj's rows and o_proj's
columns can be turned together, a head at a time. Where that is so, and how many channels a head
has, is found by trying.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.store import Part
from compress.weights import Dense
from compress.wiring import Run, Wire, copied, same


@dataclass(frozen=True)
class Head:
    """A wire between two sites; every ``size`` neighbouring channels can be turned together."""

    wire: Wire
    size: int

    def turn(self, part: Part, R: Tensor) -> None:
        """Write the channels x of each head as x·R; R float64 [size, size]."""
        assert self.wire.site is not None
        made = self.wire.source.unique()
        weight = part.weights[self.wire.site.name]
        rows = weight.dense().double()
        rows[made] = (R.T @ rows[made].unflatten(0, (-1, self.size))).flatten(0, 1)
        part.weights[self.wire.site.name] = Dense.of(rows, weight.dtype)
        bias = part.others.get(f"{self.wire.site.name}.bias")
        if bias is not None:
            moved = bias.double()
            moved[made] = (moved[made].unflatten(0, (-1, self.size)) @ R).flatten()
            part.others[f"{self.wire.site.name}.bias"] = moved.to(bias.dtype)
        for site in self.wire.readers:
            weight = part.weights[site.name]
            columns = weight.dense().double().unflatten(1, (-1, self.size)) @ R
            part.weights[site.name] = Dense.of(columns.flatten(1), weight.dtype)


def find_heads(wires: tuple[Wire, ...], part: Part, run: Run) -> Iterator[Head]:
    """The heads of one block, as large as they can be; none of a single channel.

    What can be turned together is a multiple of all that can: prime factors are tried in turn.
    """
    before = None
    for wire in wires:
        if wire.site is None:
            continue
        before = run(part)[0] if before is None else before
        size = 1
        for prime, times in _factors(len(wire.source.unique())):
            for _ in range(times):
                head = Head(wire, size * prime)
                if not _aligned(head):
                    break
                turned = copied(part)
                head.turn(turned, _random(head.size))
                if not same(before, run(turned)[0]):
                    break
                size = head.size
        if size > 1:
            yield Head(wire, size)


def _aligned(head: Head) -> bool:
    """Whether inputs of the readers that stand together come from one head, in its order."""
    made = head.wire.source.unique()
    if len(head.wire.source) % head.size:
        return False
    place = torch.searchsorted(made, head.wire.source).view(-1, head.size)
    first = place[:, :1]
    return bool((first % head.size == 0).all()) and torch.equal(
        place, first + torch.arange(head.size)
    )


def _factors(number: int) -> Iterator[tuple[int, int]]:
    """Prime factors and how often each divides ``number``, the smallest first."""
    prime = 2
    while number > 1:
        times = 0
        while number % prime == 0:
            number //= prime
            times += 1
        if times:
            yield prime, times
        prime += 1


def _random(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q
