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
from compress.compressors.structure.depth import Depth, seam
from compress.errors import ModelError
from compress.events import Event
from compress.layerwise import record
from compress.problem import LayerProblem
from compress.recipe import Recipe, Stage
from compress.shape import Reshaped, renamed, shortened
from compress.source import Source
from compress.store import Blocks, Part, Store
from compress.weights import Dense, Weight
from compress.wiring import Probe, same

Passes = Sequence[Callable[[nn.Module], Any]]
Fix = tuple[Site, Weight, Tensor | None]  # a matrix that was repaired, and its bias
ROWS = 64  # tokens of text that show whether what a matrix writes is simply added


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
    prove(source, range(compressor.keeps(total)))
    if distributed.rank():
        return {}
    work = _Work(source, before, forward_passes(recipe, source))
    free = {site.block for site in stage.sites(source.anatomy) if site.block is not None}
    influence = work.influence()
    gone: list[int] = []
    costs = []
    steps = total - compressor.keeps(total)
    for step in range(steps):
        left = sorted(free - set(gone), key=lambda i: influence[i])
        if not left:
            raise ModelError(f"{stage.use}: {steps} blocks should go, and only {len(free)} may")
        options = [[*gone, i] for i in left[: compressor.shortlist]]
        if compressor.choose == "influence":
            options = options[:1]
        else:
            found = work.divergences(options)
            costs.append(min(found))
            options = [options[found.index(min(found))]]
        (gone,) = options
        yield Event(stage.use, step + 1, steps + 1, {})
    layers = [i for i in range(total) if i not in gone]
    report: dict[str, Any] = {"influence": influence, "dropped": gone, "kl": costs}
    repaired: dict[int, Fix] = {}
    if compressor.repair:
        repaired, report["repair"] = work.repair(gone)
    after = prove(source, layers)
    for i, origin in enumerate(after.origins):
        part = before.read(origin)
        if origin in repaired:
            site, weight, bias = repaired[origin]
            problem = LayerProblem(site.name, part.weights[site.name])
            part.records.append(record(number, stage, site, problem, weight) | {"packs": False})
            part.weights[site.name] = weight
            if bias is not None:
                part.others[f"{site.name}.bias"] = bias
        store.write(i, moved(part, source.anatomy.blocks[origin], after.anatomy.blocks[i]))
    yield Event(stage.use, steps + 1, steps + 1, {})
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
    def divergences(
        self, options: Sequence[Sequence[int]], student: nn.Module | None = None
    ) -> list[float]:
        """KL(original ‖ student without the blocks) for each of ``options``, nats a token."""
        student = student or self.original
        total, tokens = [0.0] * len(options), 0
        for forward in self.passes:
            p = _predictions(forward(self.original))
            tokens += len(p)
            for i, gone in enumerate(options):
                with skipping(student, [self.names[n] for n in gone]):
                    q = _predictions(forward(student))
                total[i] += float((p.exp() * (p - q)).sum())
        return [round(x / tokens, 6) for x in total]

    def repair(self, gone: Sequence[int]) -> tuple[dict[int, Fix], list[dict[str, Any]]]:
        """By block of the anatomy, what was repaired; and what the record says of every seam."""
        student = assemble(self.source, self.before, torch.float32)
        fixed: dict[int, Fix] = {}
        said: list[dict[str, Any]] = []
        (kl,) = self.divergences([gone], student)
        for last in range(len(self.names)):
            if last in gone or last + 1 not in gone:
                continue
            block = self.source.anatomy.blocks[last + 1]
            writers = [site for site in block.sites if site.role == "down_proj"]
            if len(writers) != 1 or not self.adds(student, writers[0], self.names[last]):
                said.append({"block": last, "kept": False, "why": "its output is not a plain sum"})
                continue
            (site,) = writers
            part = self.before.read(last + 1)
            fix = self.fold(student, gone, last, site, part)
            self.put(student, fix)
            (after,) = self.divergences([gone], student)
            said.append({"block": last, "kl_before": kl, "kl": after, "kept": after < kl})
            if after < kl:
                kl, fixed[last + 1] = after, fix
            else:
                bias = part.others.get(f"{site.name}.bias")
                self.put(student, (site, part.weights[site.name], bias))
        return fixed, said

    @torch.no_grad()
    def adds(self, model: nn.Module, site: Site, block: str) -> bool:
        """Whether the block's output is what ``site`` puts out, plus something else."""
        parameter = model.get_parameter(site.parameter)
        outputs = []
        with captured(model, [site.name], [block]) as (read, made):
            for factor in (1, 2):
                parameter.mul_(factor)
                self.passes[0](model)
                outputs.append(made[block][:ROWS])
            parameter.div_(2)
            W = parameter.T if site.layout == "conv1d" else parameter
            return same(read[site.name][:ROWS] @ W.T, outputs[1] - outputs[0])

    @torch.no_grad()
    def fold(
        self, student: nn.Module, gone: Sequence[int], last: int, site: Site, part: Part
    ) -> Fix:
        """The matrix that writes before the cut with what is missing after it folded in."""
        end = last + 1
        while end + 1 in gone:
            end += 1
        after = self.names[end]
        width, out = site.shape[1], site.shape[0]
        A, C = torch.zeros(width + 1, width + 1), torch.zeros(out, width + 1)
        tokens = 0
        without = [self.names[n] for n in gone]
        for forward in self.passes:
            with captured(self.original, [], [after]) as (_, wanted):
                forward(self.original)
            with (
                skipping(student, without),
                captured(student, [site.name], [self.names[last]]) as (read, made),
            ):
                forward(student)
            a = F.pad(read[site.name], (0, 1), value=1.0)
            A.addmm_(a.T, a)
            C.addmm_((wanted[after] - made[self.names[last]]).T, a)
            tokens += len(a)
        weight = part.weights[site.name]
        bias = part.others.get(f"{site.name}.bias")
        change, shift = seam(C / tokens, A / tokens, centred=bias is not None)
        if bias is not None:
            bias = (bias.float() + shift).to(bias.dtype)
        return site, Dense.of(weight.dense() + change, weight.dtype), bias

    def put(self, student: nn.Module, fix: Fix) -> None:
        site, weight, bias = fix
        put(student, self.source.anatomy, site.parameter, dense_tensor(site, weight).float())
        if bias is not None:
            put(student, self.source.anatomy, f"{site.name}.bias", bias.float())


def _predictions(output: Any) -> Tensor:
    """float32 log-probabilities [tokens, classes].

    Raises:
        ModelError: the model makes no predictions.
    """
    if not isinstance(getattr(output, "logits", None), Tensor):
        raise ModelError(
            "this model has no logits to compare; set choose: influence, repair: false"
        )
    return output.logits.float().flatten(0, -2).log_softmax(-1)
