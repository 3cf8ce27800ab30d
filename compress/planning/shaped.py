"""A planner for each shape of the model: the plan is the best of theirs."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path

from compress.errors import DataError, RecipeError
from compress.events import Event
from compress.planning.law import Law
from compress.planning.measure import divergence
from compress.planning.plan import Plan
from compress.planning.planner import Planner
from compress.planning.shapes import Shape, reshaped, stages_of
from compress.recipe import Recipe
from compress.source import Source

FAR = 1.5  # times the least KL that was measured: no prediction was ever so wrong


class ShapedPlanner:
    """What ``Planner`` does, for the original's shape and those that ``uses`` (depth, width) make.

    ``make`` gives the planner of a shape. What a shape costs, its KL to the original, is measured
    and added to what its matrices cost; the law from costs to KL is the original's. ``plain`` keeps
    to shapes that a config can say.

    Raises:
        DataError: too little text to measure shapes on.
    """

    def __init__(
        self, make: Callable[[Shape | None], Planner], uses: Sequence[str], *, plain: bool = False
    ) -> None:
        self.make, self.uses, self.plain = make, uses, plain
        self.whole = make(None)
        self.planners = [self.whole]
        self.folder = tempfile.TemporaryDirectory()
        if self.whole.held is None:
            raise DataError("too little text to measure shapes on; give more, or fewer samples")

    @property
    def source(self) -> Source:
        return self.whole.source

    @property
    def recipe(self) -> Recipe:
        return self.whole.recipe

    @property
    def law(self) -> Law | None:
        return self.whole.law

    @property
    def least(self) -> int:
        """Bytes of the smallest file that can be planned."""
        return min(planner.least for planner in self.planners)

    def look(self) -> Generator[Event, None, None]:
        """Costs of every option of every matrix, in every shape; shapes are made anew."""
        yield from self.whole.look()
        recipe, held = self.whole.recipe, self.whole.held
        assert held is not None
        stages = list(stages_of(self.uses, self.source, plain=self.plain))
        for number, stage in enumerate(stages):
            folder = Path(self.folder.name) / str(number)
            shape = yield from reshaped(stage, recipe, self.source, folder)
            kl, _ = divergence(shape.source, shape.blocks, held)
            planner = self.make(replace(shape, kl=kl))
            yield from planner.look()
            self.planners.append(planner)
            yield Event("shapes", number + 1, len(stages))

    def work(self, budget: int | None = None) -> Generator[Event, None, None]:
        """All that takes time: costs, and what they come to.

        Raises:
            RecipeError: even the fewest bytes are more than ``budget``, known before measuring.
        """
        yield from self.look()
        if budget is not None:
            self.fit(budget)
        yield from self.whole.calibrate()
        for planner in self.planners:
            planner.law = self.whole.law

    def useful(self) -> int:
        """As ``Planner`` says it of the original's shape."""
        return self.whole.useful()

    def fit(self, budget: int) -> Plan:
        """The settings that should cost least within ``budget`` bytes.

        Raises:
            RecipeError: no shape has any.
        """
        return min(self.fits(budget), key=lambda plan: plan.expected)

    def measured(self, made: Plan) -> Plan:
        return self._of(made).measured(made)

    def best(self, budget: int) -> Generator[Event, None, Plan]:
        """By measured KL, of the plans of all shapes but those that are predicted to be far off."""
        first, *others = sorted(self.fits(budget), key=lambda plan: plan.expected)
        best = self.measured(first)
        for number, plan in enumerate(others, 1):
            yield Event("compare shapes", number, len(others) + 1)
            if not plan.predicted or plan.expected < FAR * best.expected:
                best = min(best, self.measured(plan), key=lambda plan: plan.expected)
        return best

    def refine(
        self, made: Plan, tries: int, seconds: float = math.inf
    ) -> Generator[Event, None, Plan]:
        """The best of all shapes, refined as ``Planner`` does."""
        best = yield from self.best(made.budget)
        return (yield from self._of(best).refine(best, tries, seconds))

    def frontier(self, count: int) -> Generator[Event, None, list[Plan]]:
        """The best for ``count`` sizes, measured where shapes are near each other."""
        plans = []
        for size in self.whole.sizes(count):
            plans.append((yield from self.best(size)))
        return plans

    def fits(self, budget: int) -> list[Plan]:
        """The plan of every shape that is small enough."""
        able = [planner for planner in self.planners if planner.least <= budget]
        if not able:
            raise RecipeError(
                f"{budget:,} bytes are too few: {self.least:,} is the least in any shape"
            )
        return [planner.fit(budget) for planner in able]

    def _of(self, made: Plan) -> Planner:
        """The planner of a plan's shape."""
        stages = tuple(made.recipe.stages)
        found = (p for p in self.planners if p.shape.stages == stages[: len(p.shape.stages)])
        *_, last = found  # the original's begins all
        return last
