"""The planner: costs of all options once, then the best settings for any size in moments.

Options are rounded in the model as it is, and the loss's own gradients say what each costs
(``quantization.bits.cost``). A few plans between the least size and eight bits are applied and
measured, which turns costs into KL (``law.py``). Both are kept (``cache.py``), so that the next
size, or a whole frontier, takes no new pass over the text.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from compress.anatomy import Site, joined
from compress.calibration import calibrates, check_text, text
from compress.compressors.base import CalibratedCompressor
from compress.compressors.budget import least_cost
from compress.compressors.quantization.gptq import GPTQ
from compress.errors import DataError, ModelError, RecipeError
from compress.events import Event
from compress.layerwise import measured_sensitivities, problems
from compress.objective import Examples, family
from compress.planning.cache import Cache, digest
from compress.planning.files import Files
from compress.planning.law import Law
from compress.planning.measure import held_out, measure
from compress.planning.menus import REFERENCE, Grids, Menu, fast, menus_of
from compress.planning.options import Choices, Option, Settings, cheapest, settings_of
from compress.planning.plan import Plan
from compress.planning.shapes import Shape
from compress.planning.worth import Worth, kinds
from compress.problem import LayerProblem
from compress.recipe import Recipe, Stage
from compress.sensitivity import Sensitivity
from compress.source import Source
from compress.store import Store
from compress.writer import versions

ANCHORS = 8  # measured plans that the law goes through
USEFUL = 0.5  # nats a token: of a plan that costs more nobody asks what it costs exactly


class Planner:
    """Plans for one ``stage`` of a recipe, whose method goes by a size.

    ``methods`` are those that sites may get, that of the stage alone unless given. ``plain`` keeps
    to what compressed-tensors holds: grids, no packed tables, groups that divide widths, and one
    setting for matrices that engines join. ``speed`` keeps to what the packed runtime computes
    faster than the matrix as it is. ``shape`` is the model that the stage finds, if that is not the
    original.

    Raises:
        ModelError: the model predicts no tokens. DataError: there is no text. RecipeError: a
        method does not go by a size, or nothing is left to choose.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        stage: Stage,
        *,
        methods: Sequence[str] | None = None,
        cache: Path | None = None,
        plain: bool = False,
        speed: bool = False,
        shape: Shape | None = None,
    ) -> None:
        self.shape = shape or Shape.whole(source)
        source = self.shape.source
        own = stage.compressor if isinstance(stage.compressor, CalibratedCompressor) else None
        methods = [m for m in methods or [stage.use] if m == "gptq" or not plain]
        self.menus = menus_of(methods, own)
        if not self.menus:
            raise RecipeError("compressed-tensors holds what gptq makes, which is not asked for")
        if not calibrates(stage, recipe, source):
            if not recipe.data:
                raise DataError("a plan needs text: give --data")
            raise ModelError(f"{source.model_class.__name__} reads no text, so nothing tells costs")
        if family(source.skeleton) == "other":
            name = source.model_class.__name__
            raise ModelError(f"{name} predicts no tokens, so nothing tells what an error costs")
        if "admm" in self.menus:  # zeros save bytes where the file holds masks
            recipe = recipe.model_copy(update={"storage": "compact"})
        self.recipe = recipe.model_copy(update={"stages": [*self.shape.stages, stage]})
        check_text(self.recipe, source)
        self.source, self.stage, self.plain, self.speed = source, stage, plain, speed
        for menu in self.menus.values():
            if isinstance(menu, Grids):
                menu.dividing = plain
        self.files = Files(source, self.menus, recipe.storage)
        self.sites = {
            site.name: site
            for site in stage.sites(source.anatomy)
            if (not plain or (site.layout == "linear" and not site.aliases))
            and any(menu.knots(site) for menu in self.menus.values())
        }
        if not self.sites:
            raise RecipeError("none of the weights that are taken can be held packed")
        self.choices: list[Choices] = []
        self.law: Law | None = None
        wanted = recipe.calibration
        read = text(recipe, source, wanted.samples, wanted.length)
        key = [source.hash, read.hash, recipe.seed, recipe.untie, versions()]
        self.cache = Cache(cache, key + [one.dump() for one in self.shape.stages])

    @property
    def least(self) -> int:
        """Bytes of the smallest file that can be planned."""
        return self.files.size(settings_of((c, 0) for c in self.choices))

    @property
    def most(self) -> int:
        """Bytes with every matrix in the largest of its options that is not itself."""
        return self.files.size(settings_of((c, c.largest) for c in self.choices))

    def useful(self) -> int:
        """Bytes of about the smallest plan that costs no more than ``USEFUL``, or of the least."""
        low, high = self.least, self.most
        if self.fit(low).cost <= USEFUL:
            return low
        while high > 1.01 * low:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fit(middle).cost > USEFUL else (low, middle)
        return high

    def work(self, budget: int | None = None) -> Generator[Event, None, None]:
        """All that takes time: costs, and what they come to.

        Raises:
            RecipeError: even the fewest bytes are more than ``budget``, known before measuring.
        """
        yield from self.look()
        if budget is not None:
            self.fit(budget)
        yield from self.calibrate()

    def frontier(self, count: int) -> Generator[Event, None, list[Plan]]:
        """The best for ``count`` sizes; nothing is measured."""
        yield from ()
        return [self.fit(size) for size in self.sizes(count)]

    def sizes(self, count: int) -> list[int]:
        """``count`` of them, evenly from the least that is of use up to ``most``."""
        most, least = self.most, self.useful()
        return [least + (most - least) * n // (count - 1) for n in range(count)]

    def look(self) -> Generator[Event, None, None]:
        """Cost of every option of every matrix, in one backward pass over the text and one more.

        The model is in memory once, as float32.
        """
        missing = {name: left for name in self.sites if (left := self._untried(name))}
        if missing:
            done = len(self.sites) - len(missing)
            yield Event("options", done, len(self.sites))
            for problem in self._problems():
                if problem.name not in missing:
                    continue
                costs = self.cache.costs.setdefault(problem.name, {})
                for menu in missing[problem.name]:
                    found = menu.costs(problem, self.sites[problem.name])
                    costs |= {f"{menu.key} {label}": price for label, price in found.items()}
                self.cache.keep()
                done += 1
                yield Event("options", done, len(self.sites))
        seen = [s for s in self.sites.values() if s.name in self.cache.costs]  # by some token
        groups = joined(seen) if self.plain else [[site] for site in seen]
        self.choices = [Choices.of(sites, self._options(sites)) for sites in groups]

    def calibrate(self) -> Iterator[Event]:
        """Apply and measure a few plans over the whole range of sizes."""
        if self.held is None:
            return
        most, least = self.most, self.useful()
        costs, found = [], []
        yield Event("measure", 0, ANCHORS)
        for number in range(ANCHORS):
            made = self.fit(int(least * (most / least) ** (number / (ANCHORS - 1))))
            costs.append(made.cost)
            found.append(self.measure(made)[0])
            yield Event("measure", number + 1, ANCHORS)
        self.law = Law.of(costs, found)

    def fit(self, budget: int, choices: list[Choices] | None = None) -> Plan:
        """The settings of least cost (by ``choices``, else the trials') within ``budget`` bytes.

        Raises:
            RecipeError: even the fewest bits are too many.
        """
        if self.least > budget:
            raise RecipeError(
                f"{budget:,} bytes are too few: {len(self.choices)} matrices by "
                f"{', '.join(self.menus)} come to {self.least:,} at least "
                f"({self.least / self.source.nbytes:.1%}); take more of them (targets: all), or "
                "other families"
            )
        settings, bytes = self._fitting(choices or self.choices, budget)
        cost = self._cost(settings)
        left = budget - bytes + self._bytes(settings)
        bound = least_cost([(c.sizes, c.costs) for c in self.choices], left)
        gap = max(0.0, 1 - bound / cost) if cost else 0.0
        made = Plan(
            self._recipe(settings),
            settings,
            bytes,
            budget,
            self.shape.kl + cost,
            gap,
            self.files.format(settings).name,
        )
        if self.law is None or cost > self.law.most:
            return made
        wider, _ = self._fitting(self.choices, budget + self.source.nbytes // 100)
        kl, low, high = self.law.predict(cost)
        floor = self.shape.kl
        return replace(
            made,
            predicted=(floor + kl, floor + low, floor + high),
            next=kl - self.law.predict(self._cost(wider))[0],
        )

    def measure(self, made: Plan) -> tuple[float, float]:
        """KL and its standard error of a plan that is really applied."""
        assert self.held is not None
        if not any(option.use for option in made.settings.values()):
            return self.shape.kl, 0.0
        key = digest(made.recipe.stages[-1].dump())
        if key not in self.cache.measured:
            known = self.sensitivities if self._reads_gradients(made) else None
            found = measure(made.recipe, self.shape, self.held, known)
            self.cache.measured[key] = list(found)
            self.cache.keep()
        value, error = self.cache.measured[key]
        return value, error

    def measured(self, made: Plan) -> Plan:
        return replace(made, measured=self.measure(made)) if self.held else made

    def best(self, budget: int) -> Generator[Event, None, Plan]:
        """The plan that ``fit`` makes, measured."""
        yield from ()
        return self.measured(self.fit(budget))

    def refine(
        self, made: Plan, tries: int, seconds: float = math.inf
    ) -> Generator[Event, None, Plan]:
        """The best of ``tries`` other plans of the same size, by measured KL.

        No more are begun when ``seconds`` are over.

        What is measured tells what the costs of every kind of matrix are worth. In turn the best
        plan by what is known is tried, and one by what is still possible (Thompson 1933). The
        choice is made on the text that measures it, so ``measured`` is a little too good.
        """
        if not tries or not self.held:
            return made
        tried = [self.measured(made)]
        draw = torch.Generator().manual_seed(self.recipe.seed)
        best, start = tried[0], time.monotonic()
        for number in range(tries):
            if time.monotonic() - start >= seconds:
                break
            known = Worth.of(self._costs_by_kind(tried), Tensor([p.expected for p in tried]))
            worth = known.drawn(draw) if number % 2 == tries % 2 else known.mean.exp()
            tried.append(self.measured(self.fit(made.budget, self._weighed(worth))))
            best = min(tried, key=lambda plan: plan.expected)
            yield Event("refine", number + 1, tries, {"loss": best.expected})
        return best

    @cached_property
    def kinds(self) -> list[int]:
        """Which matrices are alike: the number of each one's kind, in the order of choices."""
        return kinds([self.sites[c.names[0]] for c in self.choices])

    @cached_property
    def held(self) -> Examples | None:
        """Text to measure on, which plans do not read; None if there is too little."""
        return held_out(self.recipe, self.source)

    def _fitting(self, choices: list[Choices], budget: int) -> tuple[dict[str, Option], int]:
        """The best choice whose file, names and all, is not above ``budget``, and its bytes."""
        dense = sum(self.sites[name].nbytes for c in choices for name in c.names)
        left = budget - self.files.size({}) + dense
        while True:
            chosen = cheapest(choices, left)
            settings = settings_of(zip(choices, chosen, strict=True))
            bytes = self.files.size(settings)
            if bytes <= budget:
                return settings, bytes
            left -= bytes - budget

    def _index(self, settings: Settings) -> list[tuple[Choices, int]]:
        return [(c, c.options.index(settings[c.names[0]])) for c in self.choices]

    def _cost(self, settings: Settings) -> float:
        return sum(float(c.costs[i]) for c, i in self._index(settings))

    def _costs_by_kind(self, plans: Sequence[Plan]) -> Tensor:
        """float64 [plans, kinds + 1], the KL of another shape last: it is there before all else."""
        found = torch.full((len(plans), 2 + max(self.kinds)), self.shape.kl).double()
        found[:, :-1] = 0
        for row, plan in zip(found, plans, strict=True):
            for kind, (choices, i) in zip(self.kinds, self._index(plan.settings), strict=True):
                row[kind] += choices.costs[i]
        return found

    def _weighed(self, worth: Tensor) -> list[Choices]:
        """The choices, their costs times what those of their kind are worth."""
        return [
            replace(c, costs=c.costs * worth[kind])
            for c, kind in zip(self.choices, self.kinds, strict=True)
        ]

    def _bytes(self, settings: Settings) -> int:
        return sum(int(c.sizes[i]) for c, i in self._index(settings))

    def _recipe(self, settings: Settings) -> Recipe:
        """What makes the shape; then an override for each matrix, what is left alone skipped."""
        made = {n: self.menus[o.use].of(o) for n, o in settings.items() if o.use}
        taken = self.stage.sites(self.source.anatomy)
        changes = {
            "compressor": self._main(settings),
            "overrides": made,
            "skip": [*self.stage.skip, *(site.name for site in taken if site.name not in made)],
            "budget": None,
        }
        stages = [*self.shape.stages, self.stage.model_copy(update=changes)]
        if not made and self.shape.stages:  # small enough as it is
            stages.pop()
        return self.recipe.model_copy(update={"stages": stages})

    def _main(self, settings: Settings) -> CalibratedCompressor:
        """The method of most matrices."""
        used = Counter(option.use for option in settings.values() if option.use)
        method = used.most_common(1)[0][0] if used else next(iter(self.menus))
        return self.menus[method].solver

    def _reads_gradients(self, made: Plan) -> bool:
        used = {option.use for option in made.settings.values() if option.use}
        return any(self.menus[method].solver.reads_gradients for method in used)

    @cached_property
    def sensitivities(self) -> dict[str, Sensitivity]:
        """What the loss's gradients say of every site in the model as it is."""
        return measured_sensitivities(self._looking, self.recipe, self.source, self.shape.blocks)

    @property
    def _looking(self) -> Stage:
        """A stage that looks at all sites, tables too, and at what the loss feels of them."""
        base = self.menus["gptq"].solver if "gptq" in self.menus else GPTQ.model_validate({})
        looks = base.model_copy(update={"bits": 3.5, "group": REFERENCE})
        return self.stage.model_copy(update={"compressor": looks, "overrides": {}})

    def _problems(self) -> Iterator[LayerProblem]:
        with tempfile.TemporaryDirectory() as folder:
            at, store = self.shape.blocks, Store(Path(folder))
            yield from problems(
                self._looking, self.recipe, self.source, at, store, self.sensitivities
            )

    def _untried(self, name: str) -> list[Menu]:
        """The menus of which something has to be tried for a matrix, and was not yet."""
        known, site = self.cache.costs.get(name, {}), self.sites[name]
        return [
            menu
            for menu in self.menus.values()
            if any(f"{menu.key} {option.label}" not in known for option in menu.knots(site))
        ]

    def _options(self, sites: Sequence[Site]) -> Iterator[tuple[int, float, Option]]:
        """Bytes, cost and option, of all options that every one of these has."""
        first, *others = ({o: (b, p) for b, p, o in self._options_of(s)} for s in sites)
        for option, found in first.items():
            if all(option in other for other in others):
                bytes, prices = zip(found, *(other[option] for other in others), strict=True)
                yield sum(bytes), sum(prices), option

    def _options_of(self, site: Site) -> Iterator[tuple[int, float, Option]]:
        for menu in self.menus.values():
            start = f"{menu.key} "
            costs = {
                label.removeprefix(start): price
                for label, price in self.cache.costs[site.name].items()
                if label.startswith(start)
            }
            for option, price in menu.options(site, costs):
                if fast(option) or not self.speed:
                    yield self.files.bytes(site, option), price, option
