"""What is asked of a planner: a size, or the least size that keeps so much of the quality."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from pathlib import Path

from compress.compressors.budget import Budget
from compress.errors import DataError, RecipeError
from compress.events import Event
from compress.planning.base import Planning
from compress.planning.cache import cache_folder
from compress.planning.menus import methods_of
from compress.planning.plan import Plan
from compress.planning.planner import Planner
from compress.planning.shaped import ShapedPlanner
from compress.planning.shapes import SHAPES, Shape
from compress.recipe import Recipe, Stage
from compress.sizes import parse_size
from compress.source import Source

STEPS = 100  # of the original's bytes: sizes that ``keep`` tells apart
NEARBY = 4  # sizes that it tries next to the law's guess
SURE = 1.96  # standard errors of a measured KL that are added to it


def plan(
    recipe: Recipe, source: Source, stage: Stage, budget: Budget, cache: Path | None = None
) -> Generator[Event, None, Plan]:
    """The settings of least cost for a file of that size; nothing is measured."""
    planner = planner_of(recipe, source, stage, budget.families, cache)
    yield from planner.look()
    return planner.fit(bytes_of(budget.size, source))


def bytes_of(size: str, source: Source) -> int:
    """``30%`` or ``300MB`` of a model, in bytes.

    Raises:
        RecipeError: it is no size, or not below the model's own.
    """
    budget = parse_size(size, source.nbytes)
    if budget >= source.nbytes:
        raise RecipeError(
            f"size {size}: the model has {source.nbytes:,} bytes as it is; give fewer"
        )
    return budget


def planner_of(
    recipe: Recipe,
    source: Source,
    stage: Stage,
    families: Sequence[str],
    cache: Path | None = None,
    *,
    plain: bool = False,
    speed: bool = False,
) -> Planning:
    """What plans with these families: shapes too, if depth or width is among them.

    Raises:
        RecipeError, DataError, ModelError: see ``Planner`` and ``ShapedPlanner``.
    """
    uses = [family for family in families if family in SHAPES]
    methods = methods_of([family for family in families if family not in SHAPES])

    def make(shape: Shape | None = None) -> Planner:
        return Planner(
            recipe, source, stage, methods=methods, cache=cache, plain=plain, speed=speed,
            shape=shape,
        )  # fmt: skip

    return ShapedPlanner(make, uses, plain=plain) if uses else make()


def keep(planner: Planning, share: float) -> Generator[Event, None, tuple[Plan, Plan | None]]:
    """The smallest plan, in steps of 1% of the bytes, that surely has exp(−KL) ≥ ``share``.

    Surely: the upper end of the 95% interval of its measured KL does, so that other text agrees.
    Perplexity then rises by about 1/share at most. Also returns the plan one step smaller, of which
    this is not sure; None if there is none so small.

    Raises:
        RecipeError: no size keeps so much. DataError: too little text to measure on.
    """
    if planner.law is None:
        raise DataError("too little text to measure on; give more, or fewer calibration.samples")
    step, allowed = planner.source.nbytes / STEPS, -math.log(share)
    fails, meets = math.ceil(planner.least / step) - 1, STEPS
    found: dict[int, Plan] = {}
    guess = next(
        (n for n in range(fails + 1, meets) if _expected(planner, n * step) <= allowed), meets - 1
    )
    while meets - fails > 1:
        made = found[guess] = yield from planner.best(int(guess * step))
        assert made.measured is not None
        kl, error = made.measured
        if kl + SURE * error <= allowed:
            meets, nearby = guess, guess - 1
        else:
            fails, nearby = guess, guess + 1
        # the law's guess is mostly a step or two off; where it is not, halving is safer
        guess = nearby if len(found) < NEARBY else (fails + meets) // 2
        yield Event("keep", len(found), 0, {"kl": kl})
    if meets not in found:
        raise RecipeError(f"no size below the original's keeps {share:.2%}")
    return found[meets], found.get(fails)


def _expected(planner: Planning, size: float) -> float:
    predicted = planner.fit(int(size)).predicted
    return predicted[0] if predicted else math.inf


def resolved(recipe: Recipe, source: Source) -> Generator[Event, None, Recipe]:
    """The recipe with settings in place of its budget, if it has one.

    Raises:
        RecipeError: it stands elsewhere than on the first stage.
    """
    budgets = [n for n, s in enumerate(recipe.stages) if s.budget and not s.overrides]
    if not budgets:
        return recipe
    if budgets != [0]:
        raise RecipeError(
            f"stages.{budgets[-1]}.budget: a size is planned for the original's matrices, so it "
            "stands on the first stage"
        )
    first, *rest = recipe.stages
    assert first.budget
    made = yield from plan(recipe, source, first, first.budget, cache_folder())
    return made.recipe.model_copy(update={"stages": [*made.recipe.stages, *rest]})
