"""A stage that narrows the residual stream.

The model is written in other coordinates of the stream, the most important first, in which a
calibrated stage of layer problems gives answers that are zero along the last; then these are cut
off. That the turned model is the same, and that the cut leaves it as it is with the zeros, is
proven first, with random weights. The model is in memory as a whole while directions are chosen.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress import distributed
from compress.assemble import assemble
from compress.blockwise import captured
from compress.calibration import forward_passes
from compress.compressors.structure.hidden import Hidden, Slice, directions, sliced
from compress.errors import ModelError
from compress.events import Event
from compress.layerwise import solve
from compress.objective import family
from compress.recipe import Recipe, Stage
from compress.rotation import Stream, find_stream, takes_all
from compress.sensitivity import sensitivities
from compress.shape import Reshaped, slimmed
from compress.source import Source
from compress.store import Blocks, Part, Store, save_tensors
from compress.weights import Dense
from compress.wiring import Probe, same


def slim(
    number: int, stage: Stage, recipe: Recipe, source: Source, before: Blocks, store: Store
) -> Generator[Event, None, dict[str, Any]]:
    """Write every block of the narrower model to ``store``; returns the stage's report.

    Raises:
        ModelError: the stream of this architecture cannot be narrowed, as far as is known here.
        RecipeError: the stage leaves out a part of the model.
    """
    compressor = stage.compressor
    assert isinstance(compressor, Hidden)
    stream = find_stream(source, _random, heads=False)
    takes_all(stage, stream, source)
    width = len(stream.R)
    keep = compressor.keeps(width, compressor.multiple)
    after = prove(source, stream, keep)
    zeroed = Store(store.folder.with_name(store.folder.name + "-zeroed"))
    chosen = zeroed.folder / "directions.safetensors"
    if not distributed.least(chosen.exists()):
        found = measured(compressor, recipe, source, before, stream)
        if not distributed.rank():
            zeroed.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(chosen, found)
        distributed.wait()
    known = load_file(chosen)
    R = known["R"]
    solver = Slice(
        keep=keep, readers=stream.readers, propagate=compressor.propagate, loss_weighted=False
    )
    inner = Stage(compressor=solver, targets=sorted(stream.readers | stream.writers))
    turned = _Turned(before, replace(stream, R=R))
    yield from solve(number, inner, recipe, source, turned, zeroed)
    distributed.wait()
    if distributed.rank():
        return {}
    shapes = {site.name: list(site.shape) for site in after.anatomy.sites}
    for i in range(len(source.anatomy.blocks)):
        part = zeroed.read(i)
        cut(i, part, stream, keep)
        for record in part.records:
            if record["number"] == number:
                name = record["name"]
                record |= {"shape": shapes[name], "bytes": part.weights[name].nbytes}
        store.write(i, part)
    zeroed.remove()
    variance = (R.T @ known["C"] @ R).diagonal()
    share = float(variance[:keep].sum() / variance.sum())
    return {"shape": after.step(source), "hidden_size": keep, "variance": round(share, 6)}


@dataclass(frozen=True)
class _Turned:
    """The blocks of a dense model, its stream turned."""

    before: Blocks
    stream: Stream

    def read(self, number: int) -> Part:
        part = self.before.read(number)
        self.stream.turn(number, part, _random)
        return part

    def header(self, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return self.before.header(number)


def measured(
    compressor: Hidden, recipe: Recipe, source: Source, before: Blocks, stream: Stream
) -> dict[str, Tensor]:
    """float64 [width, width]: R, directions of the stream, the most important first, and C."""
    plain = replace(stream, R=torch.eye(len(stream.R), dtype=torch.float64))
    model = assemble(source, _Turned(before, plain), torch.float32)
    passes = forward_passes(recipe, source)
    norms = [wire.producer.rpartition(".")[0] for here in stream.norms for wire in here]
    C = torch.zeros(len(stream.R), len(stream.R), dtype=torch.float64)
    tokens = 0
    with torch.no_grad(), captured(model, [], norms) as (_, made):
        for forward in passes:
            forward(model)
            for x in made.values():
                C += x.T @ x
                tokens += len(x)
    C = distributed.total(C) / max(1, int(distributed.total(torch.tensor(tokens))))
    G = None
    if compressor.loss_weighted and family(source.skeleton) != "other":  # or else there is no loss
        found = sensitivities(model, passes, norms)
        G = torch.stack([one.outputs.double() for one in found.values()]).sum(0)
    return {"R": directions(C, G), "C": C}


def cut(number: int, part: Part, stream: Stream, keep: int) -> None:
    """Take the last coordinates of the stream out of block ``number``, whose norms have no gain.

    The mean square of fewer numbers, with the same sum, is larger: what reads a norm makes up for
    that, because gains in 16 bits would be rounded.
    """
    gain = (len(stream.R) / keep) ** 0.5
    behind = {site.name for wire in stream.norms[number] for site in wire.readers}
    for name, weight in part.weights.items():
        W = weight.dense()
        if name in stream.readers:
            W = W[:, :keep] * (gain if name in behind else 1)
        elif name in stream.writers:
            W = W[:keep]
        part.weights[name] = Dense.of(W, weight.dtype)
    for wire in stream.norms[number]:
        part.others[wire.producer] = part.others[wire.producer][:keep].clone()


def prove(source: Source, stream: Stream, keep: int) -> Reshaped:
    """The plainest narrower model that puts out what ``source`` does with zeros, by trying.

    Raises:
        ModelError: none does.
    """
    name = source.model_class.__name__
    if not torch.equal(stream.R, _random(len(stream.R))):
        raise ModelError(
            f"{name}: its norms take the mean of the channels away (LayerNorm), and fewer channels "
            "have another; hidden is for models with RMSNorm, as Llama's"
        )
    tensors = {name for block in source.anatomy.blocks for name in block.tensors}
    biased = sorted(name for name in stream.writers if f"{name}.bias" in tensors)
    if biased:
        raise ModelError(f"{name}: {biased[0]} has a bias, and hidden knows only writers without")
    plain = replace(stream, R=torch.eye(len(stream.R), dtype=torch.float64))
    probe = Probe(source)

    def zero(number: int, part: Part) -> None:
        plain.turn(number, part, _random)
        for site in stream.readers | stream.writers:
            if site in part.weights:
                W = part.weights[site].dense()
                part.weights[site] = Dense.of(sliced(W, keep, reads=site in stream.readers))

    def read(number: int) -> Part:
        part = probe.part(number)
        plain.turn(number, part, _random)
        cut(number, part, stream, keep)
        return part

    wanted = probe.output(change=zero)
    for after in slimmed(source, keep):
        output = probe.output_of(after, read)
        if output is not None and same(wanted, output):
            return after
    raise ModelError(
        f"{name}: with a narrower residual stream it is not what its config makes of a smaller "
        "hidden_size, as far as is known here"
    )


def _random(width: int) -> Tensor:
    """An orthogonal matrix, always the same one, to try things with."""
    gaussian = torch.randn(
        width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return torch.linalg.qr(gaussian).Q
