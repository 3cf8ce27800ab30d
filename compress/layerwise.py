"""A stage of layer problems: every site solved once, block by block, with or without data.

With data, the calibration text runs through the partly compressed model, and through the model as
the stage found it (the original, if the method restores that), once each and together. Wherever a
site reads its input, all passes wait: the moments of what they read make the site's problem, the
answer goes into the compressed model, and the passes go on. So every site sees the inputs that it
will have, and nothing is computed twice.
Of several processes each runs its share of the text, and solves the problems of all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import Tensor, nn

from compress import distributed
from compress.anatomy import Site
from compress.assemble import assemble
from compress.blockwise import dense_tensor, put, stops, streamed
from compress.calibration import calibrates, forward_passes
from compress.compressors.base import CalibratedCompressor, LayerCompressor
from compress.events import Event
from compress.memory import give_back, keep_large, map_large
from compress.moments import Moments, gathered
from compress.objective import family
from compress.problem import LayerProblem, Table
from compress.recipe import Recipe, Stage
from compress.sensitivity import Sensitivity, sensitivities
from compress.solvers import prepared_all, record, solvers_of
from compress.source import Source
from compress.store import Blocks, Part, Store
from compress.weights import Weight


def solve(
    number: int,
    stage: Stage,
    recipe: Recipe,
    source: Source,
    before: Blocks,
    store: Store,
    known: dict[str, Sensitivity] | None = None,
) -> Iterator[Event]:
    """Write to ``store`` every block of ``before``, the stage's sites compressed.

    ``known`` is what the loss's gradients say of the sites, if that was measured already.

    Raises:
        ModelError: a solution is not finite.
    """
    map_large()
    if calibrates(stage, recipe, source):
        yield from _Calibrated(number, stage, recipe, source, before, store, known).events()
    else:
        yield from _without_data(number, stage, source, before, store)


def problems(
    stage: Stage,
    recipe: Recipe,
    source: Source,
    before: Blocks,
    store: Store,
    known: dict[str, Sensitivity],
) -> Iterator[LayerProblem]:
    """Every problem of a calibrated stage in the model as it is; no solving."""
    yield from _Calibrated(0, stage, recipe, source, before, store, known).problems()


def measured_sensitivities(
    stage: Stage, recipe: Recipe, source: Source, before: Blocks
) -> dict[str, Sensitivity]:
    """What the loss's gradients say of every site of a calibrated stage."""
    with tempfile.TemporaryDirectory() as folder:
        return _Calibrated(0, stage, recipe, source, before, Store(Path(folder))).measured()


def _without_data(
    number: int, stage: Stage, source: Source, before: Blocks, store: Store
) -> Iterator[Event]:
    """One pass over the blocks that are not there yet: read, solve, write."""
    compressor = stage.compressor
    assert isinstance(compressor, LayerCompressor)
    solvers = solvers_of(stage, source)
    blocks = source.anatomy.blocks

    def problems() -> Iterator[LayerProblem]:
        for i in range(len(blocks)):
            for name, weight in before.read(i).weights.items():
                if solvers.get(name) is compressor:
                    yield LayerProblem(name, weight)

    solvers = prepared_all(solvers, compressor, problems)
    for i, block in enumerate(blocks):
        start = time.perf_counter()
        if store.has(i):
            continue
        part = before.read(i)
        wanted = source.block(block)[0] if compressor.restores else None
        for site in block.sites:
            if site.name in solvers:
                goal = wanted[site.name].dense() if wanted else None
                problem = LayerProblem(site.name, part.weights[site.name], goal=goal)
                weight = solvers[site.name].compress(problem)
                part.weights[site.name] = weight
                part.records.append(record(number, stage, site, problem, weight))
        store.write(i, part)
        del part
        give_back()
        yield Event(stage.use, i + 1, len(blocks), {"seconds": time.perf_counter() - start})


class _Calibrated:
    """The pass with data. Blocks that ``store`` has already are run as they are."""

    def __init__(
        self,
        number: int,
        stage: Stage,
        recipe: Recipe,
        source: Source,
        before: Blocks,
        store: Store,
        known: dict[str, Sensitivity] | None = None,
    ) -> None:
        assert isinstance(stage.compressor, CalibratedCompressor)
        self.number, self.stage, self.compressor = number, stage, stage.compressor
        self.source, self.before, self.store = source, before, store
        self.forwards = forward_passes(recipe, source)
        self.sensitivities = known or {}
        # as the model runs, in half the memory; processors are slow at float16
        self.dtype = source.dtype if source.dtype == torch.bfloat16 else torch.float32
        self.blocks = {s.name: i for i, b in enumerate(source.anatomy.blocks) for s in b.sites}
        self.shifted: dict[str, Tensor] = {}  # biases that the model in memory has yet to get
        self.open: dict[int, Part] = {}  # blocks with sites that are still to be solved
        self.sites = {site.name: site for site in stage.sites(source.anatomy)}
        self.heads = [  # of which a matrix of all outputs' moments would be too large
            name
            for site in self.sites.values()
            for name in (site.name, *site.aliases)
            if (site.role == "head" or name in site.aliases) and self._is_linear(name)
        ]
        self.solvers = solvers_of(stage, source)
        self.left: dict[int, dict[str, Site]] = {}
        self.done = {i for i in range(len(source.anatomy.blocks)) if store.has(i)}
        distributed.wait()  # before the first process writes
        for site in self.sites.values():
            block = self.blocks[site.name]
            if block not in self.done:
                self.left.setdefault(block, {})[site.name] = site

    def events(self) -> Iterator[Event]:
        predicts = family(self.source.skeleton) != "other"  # or else there is no loss
        reads = any(self.solver(name).reads_gradients for name in self.sites)
        if predicts and reads and not self.sensitivities:
            self.sensitivities = self.measured()
        self.solvers = prepared_all(self.solvers, self.compressor, self.problems)
        total = sum(map(len, self.left.values()))
        start = time.perf_counter()

        def event() -> Event:
            nonlocal start
            seconds, start = time.perf_counter() - start, time.perf_counter()
            done = total - sum(map(len, self.left.values()))
            return Event(self.stage.use, done, total, {"seconds": seconds})

        left = [site for sites in self.left.values() for site in sites.values()]
        for name, moments in self.tables(left).items():
            self.read(self.blocks[name])
            self.settle(name, moments)
            yield event()
        names = [name for sites in self.left.values() for name in sites]
        for model, name, moments in self.walk(names, self.read):
            site, weight = self.settle(name, moments)
            dense = dense_tensor(site, weight).to(self.dtype)
            put(model, self.source.anatomy, site.parameter, dense)
            if (bias := self.shifted.pop(name, None)) is not None:
                put(model, self.source.anatomy, f"{name}.bias", bias.to(self.dtype))
            yield event()
        for number in range(len(self.source.anatomy.blocks)):
            if number not in self.done:
                part = self.read(number)
                for name in list(self.left.get(number, {})):  # no token came by
                    self.settle(name, None)
                    yield event()
                if number not in self.done:
                    self.write(number, part)

    def problems(self) -> Iterator[LayerProblem]:
        """Problems, in the model as it is before the stage, of sites without overrides."""
        common = {name for name, solver in self.solvers.items() if solver is self.compressor}
        if self.compressor.plans_tables:
            tables = [site for name, site in self.sites.items() if name in common]
            for name, read in self.tables(tables).items():
                part = self.before.read(self.blocks[name])
                yield self.problem(name, part.weights[name], read, None)
        names = [name for name in self.readers() if name in common]
        for _, name, moments in self.walk(names, self.before.read, moving=False):
            part = self.before.read(self.blocks[name])
            if self.compressor.shifts and f"{name}.bias" in part.others:
                moments = moments.centred()
            yield self.problem(name, part.weights[name], moments, None)

    def readers(self) -> list[str]:
        """Sites that read activations, in the order of the blocks."""
        return [name for name, site in self.sites.items() if site.layout != "embedding"]

    def solver(self, name: str) -> CalibratedCompressor:
        solver = self.solvers[name]
        assert isinstance(solver, CalibratedCompressor)
        return solver

    def problem(
        self, name: str, weight: Weight, moments: Moments | None, goal: Tensor | None
    ) -> LayerProblem:
        known = self.sensitivities.get(name)
        if known and name not in self.heads and self.sites[name].layout != "embedding":
            return LayerProblem(name, weight, moments, goal, Moments(known.outputs))
        return LayerProblem(name, weight, moments, goal, table=self._table(name))

    def _table(self, name: str) -> Table | None:
        """What the loss says of an embedding, of a head, or of one that is both."""
        known = self.sensitivities.get(name)
        heads = [self.sensitivities.get(n) for n in (name, *self.sites[name].aliases)]
        logits = next((h.outputs for h in heads if h and h.outputs.dim() == 1), None)
        if known and self.sites[name].layout == "embedding":
            return Table(known.lookups, known.outputs, logits)
        return None if logits is None else Table(logits=logits)

    def measured(self) -> dict[str, Sensitivity]:
        """What the loss's gradient says of every site; takes the model in memory."""
        keep_large()
        whole = assemble(self.source, self.before, torch.float32)
        names = [name for name in self.sites if name not in self.heads]
        found = sensitivities(whole, self.forwards, names, self.heads)
        map_large()
        return found

    def tables(self, sites: Sequence[Site]) -> dict[str, Moments | None]:
        """The embeddings of ``sites``: they read no activations, unless one is the head, too.

        What a tied head reads is measured before anything changes.
        """
        embeddings = [site for site in sites if site.layout == "embedding"]
        tables: dict[str, Moments | None] = {site.name: None for site in embeddings}
        heads = {alias: site.name for site in embeddings for alias in site.aliases}
        heads = {a: n for a, n in heads.items() if self._is_linear(a)}
        for _, alias, moments in self.walk(list(heads), self.before.read, moving=False):
            tables[heads[alias]] = moments
        return tables

    def walk(
        self, names: Sequence[str], read: Callable[[int], Part], *, moving: bool = True
    ) -> Iterator[tuple[nn.Module, str, Moments]]:
        """The model, and name and moments of each of ``names`` while all passes wait there.

        ``moving``: beside the model as it was before.
        """
        if not names:
            return
        readers = [read]
        if moving and any(self.solver(name).propagate for name in self.sites):
            readers.append(self.wanted)
        with ExitStack() as stack:
            models = [
                stack.enter_context(
                    streamed(
                        self.source.new_skeleton(),
                        self.source.anatomy,
                        reader,
                        self.dtype,
                        len(self.forwards),
                    )
                )
                for reader in readers
            ]
            moments: Moments | None = None
            weights: list[Tensor] | None = None
            passes = stops(models, self.forwards, names, self.store.folder)
            stack.enter_context(closing(passes))
            for stop in passes:
                name, before = stop.name, weights
                weights = self._token_weights(name)
                if moments is None or weights or before or not stop.again:
                    moments = gathered(stop.batches(), self._width(name), weights)
                del stop  # and with it what the passes need no more once they go on
                yield models[0], name, moments

    def read(self, number: int) -> Part:
        """A block as it is now; those with work to do stay here until it is done."""
        if number in self.done:
            return self.store.read(number)
        if number not in self.open:
            part = self.before.read(number)
            if number not in self.left:
                return part
            self.open[number] = part
        return self.open[number]

    def settle(self, name: str, moments: Moments | None) -> tuple[Site, Weight]:
        """Solve one site, and write its block if that was the last one."""
        number = self.blocks[name]
        part = self.open[number]
        site = self.left[number][name]
        before = part.weights[name]
        solver = self.solver(name)
        bias = part.others.get(f"{name}.bias") if solver.shifts and moments else None
        given = moments.centred() if moments and bias is not None else moments
        problem = self.problem(name, before, given, self.goal(name, before, given))
        weight, used = solver.best(problem)
        part.weights[name] = weight
        if moments and bias is not None:
            shift = moments.shift(before.dense(), weight.dense(), solver.propagate)
            part.others[f"{name}.bias"] = (bias.float() + shift).to(bias.dtype)
            self.shifted[name] = part.others[f"{name}.bias"]
        part.records.append(
            record(self.number, self.stage, site, problem, weight) | {"method": used}
        )
        del self.left[number][name]
        if not self.left[number]:
            self.write(number, self.open.pop(number))
            give_back()
        return site, weight

    def goal(self, name: str, before: Weight, moments: Moments | None) -> Tensor | None:
        """The matrix that is wanted, corrected for upstream error; None if it is ``before`` itself.

        Factors are solved one by one, each for itself.
        """
        strength = self.solver(name).propagate if moments is not None else 0
        if before.kind == "lowrank" or not (strength or self.compressor.restores):
            return None
        if self.compressor.restores:
            before = self.wanted(self.blocks[name]).weights[name]
        return moments.corrected(before.dense(), strength) if moments else before.dense()

    def wanted(self, number: int) -> Part:
        """A block of the model whose outputs are wanted."""
        if self.compressor.restores:
            return Part(*self.source.block(self.source.anatomy.blocks[number]))
        return self.before.read(number)

    def write(self, number: int, part: Part) -> None:
        if distributed.rank() == 0:
            self.store.write(number, part)
        self.done.add(number)

    def _token_weights(self, name: str) -> list[Tensor] | None:
        """How much each token counts at a site, where that was measured and is wanted."""
        known = self.sensitivities.get(name)
        solver = self.solver(name) if name in self.solvers else self.compressor  # or a tied head
        wanted = solver.loss_weighted and solver.weighs_tokens
        return known.tokens if known and wanted else None

    def _width(self, name: str) -> int:
        """Inputs of a site, or of the head that is tied to one."""
        for site in self.sites.values():
            if name in (site.name, *site.aliases):
                return site.shape[1]
        raise KeyError(name)

    def _is_linear(self, name: str) -> bool:
        return isinstance(self.source.skeleton.get_submodule(name), nn.Linear)
