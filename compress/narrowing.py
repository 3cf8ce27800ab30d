"""A stage that removes channels and heads, with least squares for what stays.

It is a calibrated stage of layer problems in the old shape, whose answers have columns of zeros,
and then a cut along them. That the cut leaves the model as it is with the zeros is proven first,
with random weights: an architecture that does more with its channels than is known here is refused
before any work.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from compress import distributed
from compress.compressors.structure.width import Narrow, Width
from compress.errors import ModelError
from compress.events import Event
from compress.layerwise import solve
from compress.recipe import Recipe, Stage
from compress.shape import Channels, Reshaped, channels, narrowed, widths
from compress.source import Source
from compress.store import Blocks, Part, Store
from compress.weights import Dense
from compress.wiring import Probe, same

Kept = dict[str, Tensor]  # by reader: the units that stay, int64


def narrow(
    number: int, stage: Stage, recipe: Recipe, source: Source, before: Blocks, store: Store
) -> Generator[Event, None, dict[str, Any]]:
    """Write every block of the narrower model to ``store``; returns the stage's report.

    Raises:
        ModelError: channels of this architecture cannot be taken out, as far as is known here.
    """
    compressor = stage.compressor
    assert isinstance(compressor, Width)
    found = channels(stage, source)
    keep = widths(stage, found)
    prove(source, found, {one.reader.name: _any(one.units, keep[one.reader.name]) for one in found})
    by_error = compressor.allocation == "error"
    shrinking = {o.reader.name: o for o in found if by_error or keep[o.reader.name] < o.units}
    steps = {n: compressor.multiple if o.part == "mlp" else 1 for n, o in shrinking.items()}
    solver = Narrow(
        units={name: one.units for name, one in shrinking.items()},
        keep={name: keep[name] for name in shrinking},
        steps=steps,
        prices={name: one.price for name, one in shrinking.items()},
        by_error=by_error,
        compensate=compressor.compensate,
        propagate=compressor.propagate if compressor.compensate else 0,
        loss_weighted=compressor.loss_weighted,
    )
    inner = Stage(compressor=solver, targets=list(shrinking))
    zeroed = Store(store.folder.with_name(store.folder.name + "-zeroed"))
    yield from solve(number, inner, recipe, source, before, zeroed)
    distributed.wait()
    if distributed.rank():
        return {}
    kept = {}
    for i, block in enumerate(source.anatomy.blocks):
        for one in found:
            if one.reader in block.sites:
                W = zeroed.read(i).weights[one.reader.name].dense()
                least = 1 if by_error else keep[one.reader.name]
                multiple = steps.get(one.reader.name, 1) if by_error else 1
                kept[one.reader.name] = staying(W, one.units, least, multiple)
    after, interleaved = prove(source, found, kept)
    for i, block in enumerate(source.anatomy.blocks):
        part = zeroed.read(i)
        own = [one for one in found if one.reader in block.sites]
        cut(part, own, kept, interleaved=interleaved)
        _account(number, stage, part, own, after)
        store.write(i, part)
    zeroed.remove()
    return {"shape": after.step(source)}


def staying(W: Tensor, units: int, least: int, multiple: int) -> Tensor:
    """The units of ``W`` [out, in] that are not all zero, int64.

    There are ``least`` of them or more, and a multiple of ``multiple``; units of zeros fill up.
    """
    alive = W.view(len(W), units, -1).abs().amax((0, 2)) > 0
    count = -(-max(least, int(alive.sum())) // multiple) * multiple
    order = (~alive).to(torch.int8).argsort(stable=True)
    return order[:count].sort().values


def cut(part: Part, found: Sequence[Channels], kept: Kept, *, interleaved: bool = False) -> None:
    """Take out of ``part`` all columns and rows of units that do not stay."""
    for one in found:
        units = kept[one.reader.name]
        reader = part.weights[one.reader.name]
        columns = one.columns(units)
        part.weights[one.reader.name] = Dense.of(reader.dense()[:, columns], reader.dtype)
        for maker in one.makers:
            rows = one.rows(maker, units, interleaved=interleaved)
            weight = part.weights[maker.name]
            part.weights[maker.name] = Dense.of(weight.dense()[rows], weight.dtype)
            bias = part.others.get(f"{maker.name}.bias")
            if bias is not None:
                part.others[f"{maker.name}.bias"] = bias[rows].clone()


def _account(
    number: int, stage: Stage, part: Part, found: Sequence[Channels], after: Reshaped
) -> None:
    """Records of the new sizes: of readers, which were solved, and of what makes their inputs."""
    shapes = {site.name: list(site.shape) for site in after.anatomy.sites}
    solved = {r["name"]: r for r in part.records if r["number"] == number}
    for one in found:
        for site in (one.reader, *one.makers):
            entry = solved.get(site.name)
            if entry is None:
                entry = {
                    "number": number,
                    "stage": stage.use,
                    "name": site.name,
                    "role": site.role,
                    "block": site.block,
                    "kind": "dense",
                    "bytes_before": site.nbytes,
                    "relative_error": 0.0,
                    "packs": True,
                    "kept": True,
                    "method": "rows removed",
                }
                part.records.append(entry)
            entry |= {"shape": shapes[site.name], "bytes": part.weights[site.name].nbytes}


def prove(source: Source, found: Sequence[Channels], kept: Kept) -> tuple[Reshaped, bool]:
    """The plainest narrower model that puts out what ``source`` does with zeros, by trying.

    Also whether the rows of fused projections are cut unit by unit.

    Raises:
        ModelError: none does.
    """
    probe = Probe(source)
    by_block = [[o for o in found if o.reader in block.sites] for block in source.anatomy.blocks]

    def zero(number: int, part: Part) -> None:
        for one in by_block[number]:
            W = part.weights[one.reader.name].dense()
            columns = one.columns(kept[one.reader.name])
            zeroed = torch.zeros_like(W).index_copy_(1, columns, W[:, columns])
            part.weights[one.reader.name] = Dense.of(zeroed)

    wanted = probe.output(change=zero)
    fused = any(s.role in ("qkv_proj", "gate_up_proj") for one in found for s in one.makers)
    for after in narrowed(source, found, {name: len(units) for name, units in kept.items()}):
        for interleaved in (False, True) if fused else (False,):

            def cut_part(number: int, interleaved: bool = interleaved) -> Part:
                part = probe.part(number)
                cut(part, by_block[number], kept, interleaved=interleaved)
                return part

            output = probe.output_of(after, cut_part)
            if output is not None and same(wanted, output):
                return after, interleaved
    raise ModelError(
        f"{source.model_class.__name__}: its {' and '.join(sorted({o.part for o in found}))} "
        "cannot be cut channel by channel as far as is known here; Llama-, GPT-2- and BERT-like "
        "models can"
    )


def _any(units: int, keep: int) -> Tensor:
    """``keep`` of ``units`` at random, always the same ones."""
    order = torch.randperm(units, generator=torch.Generator().manual_seed(0))
    return order[:keep].sort().values
