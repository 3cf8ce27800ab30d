"""A stage that writes a dense model as an equal one: scales folded into the ends of its wires.

The model itself does not change, so one pass over the calibration text tells what every wire
carries, and each block is then written with its scales. A wire is used when the stage takes all of
its readers; a site without one is left as it was, and its record says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import torch
from torch import Tensor

from compress import distributed
from compress.anatomy import Site
from compress.blockwise import Stop, stops, streamed
from compress.compressors.base import ScalingCompressor, SharedInput
from compress.events import Event
from compress.layerwise import calibration_passes
from compress.recipe import Recipe, Stage
from compress.source import Source
from compress.store import Blocks, Part, Store
from compress.weights import Weight
from compress.wiring import Wire, find_wires, fold

Scales = list[list[tuple[Wire, Tensor]]]  # by block: wires and the scales [in] of their readers


def scale(
    number: int, stage: Stage, recipe: Recipe, source: Source, before: Blocks, store: Store
) -> Iterator[Event]:
    """Write every block of ``before`` to ``store``, scales folded in.

    Raises:
        ModelError: the model's channels cannot be scaled (see ``find_wires``).
    """
    compressor = stage.compressor
    assert isinstance(compressor, ScalingCompressor)
    taken = stage.sites(source.anatomy)
    wires = usable(find_wires(source), taken, before)
    scales: Scales = [[] for _ in wires]
    total, done = sum(map(len, wires)), 0
    for block, wire, inputs in _inputs(wires, recipe, source, before):
        scales[block].append((wire, wire.pooled(compressor.scale(inputs))))
        done += 1
        yield Event(stage.use, done, total, {})
    distributed.wait()  # before the first process writes
    if distributed.rank():
        return
    for i, block in enumerate(source.anatomy.blocks):
        if store.has(i):
            continue
        part = before.read(i)
        old = dict(part.weights)
        for wire, chosen in scales[i]:
            fold(part, wire, chosen)
        for site in block.sites:
            if site in taken:
                now = part.weights[site.name]
                scaled = now is not old[site.name]
                part.records.append(record(number, stage, site, now, scaled=scaled))
        store.write(i, part)


def record(number: int, stage: Stage, site: Site, weight: Weight, *, scaled: bool) -> dict[str, Any]:
    """What compression.json says of a site whose weight changed and whose function did not."""
    return {
        "number": number,
        "stage": stage.use,
        "name": site.name,
        "role": site.role,
        "block": site.block,
        "shape": list(site.shape),
        "kind": weight.kind,
        "bytes_before": weight.nbytes,
        "bytes": weight.nbytes,
        "relative_error": 0.0,
        "packs": False,
        "kept": True,
        "method": stage.use if scaled else "as it was",
    }


def usable(
    wires: list[tuple[Wire, ...]], taken: list[Site], before: Blocks
) -> list[tuple[Wire, ...]]:
    """Wires whose readers are all taken, and whose ends are still dense."""
    chosen = []
    for number, found in enumerate(wires):
        specs, _ = before.header(number)
        chosen.append(
            tuple(
                wire
                for wire in found
                if all(reader in taken for reader in wire.readers)
                and (wire.site is None or specs[wire.site.name]["kind"] == "dense")
            )
        )
    return chosen


def _inputs(
    wires: list[tuple[Wire, ...]], recipe: Recipe, source: Source, before: Blocks
) -> Iterator[tuple[int, Wire, SharedInput]]:
    """What every wire carries when the calibration text runs through the model."""
    first = {wire.readers[0].name: (i, wire) for i, ws in enumerate(wires) for wire in ws}
    order = [s.name for s in source.anatomy.sites if s.name in first]
    passes = calibration_passes(recipe, source)
    with ExitStack() as stack:
        model = stack.enter_context(
            streamed(
                source.new_skeleton(), source.anatomy, before.read, torch.float32, len(passes)
            )
        )
        stopping = stops([model], passes, order)
        stack.enter_context(closing(stopping))
        for stop in stopping:
            number, wire = first[stop.name]
            yield number, wire, _shared(stop, wire, before.read(number))


def _shared(stop: Stop, wire: Wire, part: Part) -> SharedInput:
    """Statistics of one wire, over the text of all processes."""
    width = len(wire.source)
    H, mean, most = torch.zeros(width, width), torch.zeros(width), torch.zeros(width)
    tokens = 0
    for inputs in stop.inputs[0].values():
        x = inputs.reshape(-1, width).float()
        H += x.T @ x
        mean += x.abs().sum(0)
        most = most.maximum(x.abs().amax(0))
        tokens += len(x)
    count = max(1, int(distributed.total(torch.tensor(tokens))))
    return SharedInput(
        [part.weights[site.name].dense() for site in wire.readers],
        distributed.total(H) / count,
        wire.pooled(distributed.total(mean) / count),
        wire.pooled(distributed.largest(most)),
    )
