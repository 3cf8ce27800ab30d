"""A stage that drops blocks, and repairs the seam where they were.

That the config of fewer layers makes what the old model makes with these passed over is proven
first, with random weights. The model is in memory as a whole, twice when a seam is repaired.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress import distributed
from compress.anatomy import Block, Site
from compress.assemble import assemble
from compress.blockwise import captured, dense_tensor, put, skipping
from compress.calibration import forward_passes
from compress.compressors.distillation.losses import forward_kl, log_probabilities
from compress.compressors.structure.depth import Depth, seam
from compress.errors import ModelError
from compress.events import Event
from compress.recipe import Recipe, Stage
from compress.shape import Reshaped, renamed, shortened
from compress.source import Source
from compress.store import Blocks, Part, Store
from compress.transform import record
from compress.weights import Dense
from compress.wiring import Probe, copied, same

Passes = Sequence[Callable[[nn.Module], Any]]
WRITERS = ("o_proj", "down_proj")  # to the hidden state


def shorten(
    number: int, stage: Stage, recipe: Recipe, source: Source, before: Blocks, store: Store
) -> Generator[Event, None, dict[str, Any]]:
    """Write the blocks that stay to ``store``, renumbered; returns the stage's report.

    Raises:
        ModelError: blocks of this architecture cannot be passed over.
    """
    compressor = stage.compressor
    assert isinstance(compressor, Depth)
    total = source.anatomy.layers
    prove(source, range(total - compressor.keeps(total), total))  # all change their place
    if distributed.rank():
        return {}
    work = _Work(source, before, forward_passes(recipe, source, shared=False))
    free = {site.block for site in stage.sites(source.anatomy) if site.block is not None}
    influence = work.influence()
    gone: list[int] = []
    costs = []
    count = total - compressor.keeps(total)
    for step in range(count):
        left = sorted(free - set(gone), key=lambda i: influence[i])
        if not left:
            raise ModelError(f"{stage.use}: {count} blocks should go, and only {len(free)} may")
        options = [[*gone, i] for i in left[: compressor.shortlist]]
        if compressor.choose == "influence":
            options = options[:1]
        else:
            found = work.divergences(options)
            costs.append(min(found))
            options = [options[found.index(min(found))]]
        (gone,) = options
        yield Event(stage.use, step + 1, count, {})
    layers = [i for i in range(total) if i not in gone]
    report: dict[str, Any] = {"influence": influence, "dropped": gone, "kl": costs}
    repaired: dict[int, Part] = {}
    if compressor.repair:
        repaired, report["repair"] = yield from work.repair(gone, following=compressor.following)
    after = prove(source, layers)
    for i, origin in enumerate(after.origins):
        old, new = source.anatomy.blocks[origin], after.anatomy.blocks[i]
        part = before.read(origin)
        for site in old.sites:
            if origin not in repaired or site.role not in WRITERS:
                continue
            weight = repaired[origin].weights[site.name]
            changed = not torch.equal(weight.dense(), part.weights[site.name].dense())
            part.records.append(record(number, stage, site, weight, changed=changed))
            part.weights[site.name] = weight
            if (bias := repaired[origin].others.get(f"{site.name}.bias")) is not None:
                part.others[f"{site.name}.bias"] = bias
        store.write(i, moved(part, old, new))
    return {"shape": after.step(source)} | report


def moved(part: Part, old: Block, new: Block) -> Part:
    """``part`` of block ``old`` under the names of block ``new``."""
    return Part(
        {renamed(name, old, new): weight for name, weight in part.weights.items()},
        {renamed(name, old, new): tensor for name, tensor in part.others.items()},
        [r | {"name": renamed(r["name"], old, new), "block": new.index} for r in part.records],
    )


def prove(source: Source, layers: Sequence[int]) -> Reshaped:
    """The model of these layers, having seen that it does what ``source`` does without the others.

    Raises:
        ModelError: it does not.
    """
    after = shortened(source, layers)
    probe = Probe(source)
    with skipping(probe.skeleton, [b.name for i, b in _layers(source) if i not in layers]):
        wanted = probe.output()

    def read(number: int) -> Part:
        origin = after.origins[number]
        blocks = source.anatomy.blocks[origin], after.anatomy.blocks[number]
        return moved(probe.part(origin), *blocks)

    output = probe.output_of(after, read)
    if output is None or not same(wanted, output):
        raise ModelError(
            f"{source.model_class.__name__}: without some of its layers it is not what its config "
            "makes of fewer, because they differ by their place; none can be dropped"
        )
    return after


def _layers(source: Source) -> list[tuple[int, Block]]:
    return list(enumerate(source.anatomy.blocks[1:]))


class _Work:
    """The model in memory, and the text that it reads."""

    def __init__(self, source: Source, before: Blocks, passes: Passes) -> None:
        self.source, self.before, self.passes = source, before, passes
        self.names = [block.name for _, block in _layers(source)]
        self.original = assemble(source, before, torch.float32)

    @torch.no_grad()
    def influence(self) -> list[float]:
        """1 − E cos(x_l, x_{l+1}) of every block."""
        total, tokens = torch.zeros(len(self.names), dtype=torch.float64), 0
        with captured(self.original, self.names, self.names) as (read, made):
            for forward in self.passes:
                forward(self.original)
                tokens += len(read[self.names[0]])
                for i, name in enumerate(self.names):
                    total[i] += F.cosine_similarity(read[name], made[name], dim=-1).sum()
        return [round(float(1 - x), 6) for x in total / tokens]

    @torch.no_grad()
    def divergences(self, options: Sequence[Sequence[int]]) -> list[float]:
        """KL(original ‖ original without the blocks) for each of ``options``, nats a token."""
        total, tokens = [0.0] * len(options), 0
        for forward in self.passes:
            p = _predictions(forward(self.original))
            tokens += len(p)
            for i, gone in enumerate(options):
                with skipping(self.original, [self.names[n] for n in gone]):
                    total[i] += float(forward_kl(p, _predictions(forward(self.original))).sum())
        return [round(x / tokens, 6) for x in total]

    def repair(
        self, gone: Sequence[int], *, following: bool
    ) -> Generator[Event, None, tuple[dict[int, Part], list[dict[str, Any]]]]:
        """By block of the anatomy, what was repaired; and what the record says of every attempt.

        The run of both models that tells what one repair was worth tells what the next must make.
        """
        student = assemble(self.source, self.before, torch.float32)
        todo = [
            (i + 1, site)
            for i, block in _layers(self.source)
            if i not in gone and (i + 1 in gone or (i > min(gone) and following))
            for site in block.sites
            if site.role in WRITERS
        ]
        parts = {number: self.before.read(number) for number, _ in todo}
        said: list[dict[str, Any]] = []
        kl, sums = self.look(student, gone, todo[0] if todo else None)
        for i, (number, site) in enumerate(todo):
            part = parts[number]
            old = copied(part)
            fold(part, site, *sums)
            self.put(student, site, part)
            following_one = todo[i + 1] if i + 1 < len(todo) else None
            after, sums = self.look(student, gone, following_one)
            kept = after < kl
            said.append({"name": site.name, "kl_before": kl, "kl": after, "kept": kept})
            if kept:
                kl = after
            else:
                parts[number] = old
                self.put(student, site, old)
                _, sums = self.look(student, gone, following_one)
            yield Event("repair", i + 1, len(todo), {})
        return parts, said

    @torch.no_grad()
    def look(
        self, student: nn.Module, gone: Sequence[int], at: tuple[int, Site] | None
    ) -> tuple[float, tuple[Tensor, Tensor]]:
        """KL(original ‖ student without the blocks); and for a site in a block ``at``, RᵀA and AᵀA.

        A [tokens, in + 1] is what the site reads, and ones; R [tokens, out] is what the hidden
        state lacks after the block, or after the cut that follows it.
        """
        reads, makes, ends = [], [], []
        C, H = torch.zeros(0), torch.zeros(0)
        if at is not None:
            number, site = at
            end = number - 1
            while end + 1 in gone:
                end += 1
            reads, makes, ends = [site.name], [self.names[number - 1]], [self.names[end]]
            rows, columns = site.shape
            C, H = torch.zeros(rows, columns + 1), torch.zeros(columns + 1, columns + 1)
        total, tokens = 0.0, 0
        for forward in self.passes:
            with captured(self.original, [], ends) as (_, wanted):
                p = _predictions(forward(self.original))
            with (
                skipping(student, [self.names[n] for n in gone]),
                captured(student, reads, makes) as (read, made),
            ):
                total += float(forward_kl(p, _predictions(forward(student))).sum())
            tokens += len(p)
            if at is not None:
                A = F.pad(read[reads[0]], (0, 1), value=1.0)
                H.addmm_(A.T, A)
                C.addmm_((wanted[ends[0]] - made[makes[0]]).T, A)
        return round(total / tokens, 6), (C / tokens, H / tokens)

    def put(self, student: nn.Module, site: Site, part: Part) -> None:
        """The matrix and the bias of ``site`` as ``part`` has them."""
        dense = dense_tensor(site, part.weights[site.name]).float()
        put(student, self.source.anatomy, site.parameter, dense)
        if (bias := part.others.get(f"{site.name}.bias")) is not None:
            put(student, self.source.anatomy, f"{site.name}.bias", bias.float())


def fold(part: Part, site: Site, missing: Tensor, moments: Tensor) -> None:
    """Let the matrix and the bias of ``site`` make what is missing, too."""
    bias = part.others.get(f"{site.name}.bias")
    change, shift = seam(missing, moments, centred=bias is not None)
    weight = part.weights[site.name]
    part.weights[site.name] = Dense.of(weight.dense() + change, weight.dtype)
    if bias is not None:
        part.others[f"{site.name}.bias"] = (bias.float() + shift).to(bias.dtype)


def _predictions(output: Any) -> Tensor:
    """float32 log-probabilities [tokens, classes].

    Raises:
        ModelError: the model makes no predictions.
    """
    if not isinstance(getattr(output, "logits", None), Tensor):
        raise ModelError(
            "this model has no logits to compare; set choose: influence, repair: false"
        )
    return log_probabilities(output.logits.flatten(0, -2))
