"""A stage that writes a dense model as an equal one: a rotation, or scales of its wires.

Scales are chosen from what wires carry. The model itself does not change, so one pass over the
calibration text tells that for all, and each block is then written with its scales. A wire is used
when the stage takes all of its readers; a site without one is left as it was, and its record says
so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import distributed
from compress.anatomy import Site
from compress.blockwise import Stop, stops, streamed
from compress.calibration import forward_passes
from compress.compressors.base import RotationCompressor, ScalingCompressor, SharedInput
from compress.events import Event
from compress.recipe import Recipe, Stage
from compress.rotation import find_stream, takes_all
from compress.solvers import about
from compress.source import Source
from compress.store import Blocks, Part, Store
from compress.weights import Weight
from compress.wiring import Wire, find_wires, fold

Scales = list[list[tuple[Wire, Tensor]]]  # by block: wires and the scales [in] of their readers


def transform(
    number: int, stage: Stage, recipe: Recipe, source: Source, before: Blocks, store: Store
) -> Iterator[Event]:
    """Write every block of ``before`` to ``store``, scales or a rotation folded in.

    Raises:
        ModelError: the model would not stay the same (see ``find_wires`` and ``find_stream``).
        RecipeError: a rotation of a part of the model.
    """
    compressor = stage.compressor
    if isinstance(compressor, RotationCompressor):
        yield from _turn(number, stage, compressor, source, before, store)
    else:
        assert isinstance(compressor, ScalingCompressor)
        yield from _scale(number, stage, compressor, recipe, source, before, store)


def _turn(
    number: int,
    stage: Stage,
    compressor: RotationCompressor,
    source: Source,
    before: Blocks,
    store: Store,
) -> Iterator[Event]:
    if distributed.rank():
        return
    stream = find_stream(source, compressor.rotation, heads=compressor.heads)
    takes_all(stage, stream, source)
    turned = stream.readers | stream.writers
    blocks = source.anatomy.blocks
    for i, block in enumerate(blocks):
        if not store.has(i):
            part = before.read(i)
            stream.turn(i, part, compressor.rotation)
            for site in block.sites:
                weight, changed = part.weights[site.name], site.name in turned
                part.records.append(record(number, stage, site, weight, changed=changed))
            store.write(i, part)
        yield Event(stage.use, i + 1, len(blocks), {})


def _scale(
    number: int,
    stage: Stage,
    compressor: ScalingCompressor,
    recipe: Recipe,
    source: Source,
    before: Blocks,
    store: Store,
) -> Iterator[Event]:
    taken = stage.sites(source.anatomy)
    wires = usable(find_wires(source), taken, before)
    scales: Scales = [[] for _ in wires]
    total = sum(map(len, wires))
    found = _inputs(wires, recipe, source, before, store.folder)
    for done, (place, wire, inputs) in enumerate(found, start=1):
        scales[place].append((wire, wire.pooled(compressor.scale(inputs))))
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
                changed = now is not old[site.name]
                part.records.append(record(number, stage, site, now, changed=changed))
        store.write(i, part)


def record(
    number: int, stage: Stage, site: Site, weight: Weight, *, changed: bool
) -> dict[str, Any]:
    """What compression.json says of a site whose weight changed and whose function did not."""
    return about(number, stage, site, weight) | {
        "bytes_before": weight.nbytes,
        "bytes": weight.nbytes,
        "relative_error": 0.0,
        "packs": False,
        "kept": True,
        "method": stage.use if changed else "as it was",
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
    wires: list[tuple[Wire, ...]], recipe: Recipe, source: Source, before: Blocks, folder: Path
) -> Iterator[tuple[int, Wire, SharedInput]]:
    """What every wire carries when the calibration text runs through the model."""
    first = {wire.readers[0].name: (i, wire) for i, ws in enumerate(wires) for wire in ws}
    order = [s.name for s in source.anatomy.sites if s.name in first]
    passes = forward_passes(recipe, source)
    with ExitStack() as stack:
        model = stack.enter_context(
            streamed(source.new_skeleton(), source.anatomy, before.read, torch.float32, len(passes))
        )
        stopping = stops([model], passes, order, folder)
        stack.enter_context(closing(stopping))
        for stop in stopping:
            number, wire = first[stop.name]
            yield number, wire, _shared(stop, wire, before.read(number))


def _shared(stop: Stop, wire: Wire, part: Part) -> SharedInput:
    """Statistics of one wire, over the text of all processes."""
    width = len(wire.source)
    H, mean, most = torch.zeros(width, width), torch.zeros(width), torch.zeros(width)
    tokens = 0
    for _, (inputs,) in stop.batches():
        assert inputs is not None
        x = inputs.reshape(-1, width).float()
        H.addmm_(x.T, x)
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
