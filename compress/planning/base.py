"""What is asked of a planner, whether for the original's shape or for several."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Protocol

from compress.events import Event
from compress.planning.law import Law
from compress.planning.plan import Plan
from compress.recipe import Recipe
from compress.source import Source


class Planning(Protocol):
    """``work`` comes first; what it found out answers all the rest."""

    @property
    def source(self) -> Source: ...
    @property
    def recipe(self) -> Recipe: ...
    @property
    def law(self) -> Law | None:
        """None if there was too little text to measure on."""

    @property
    def least(self) -> int:
        """Bytes of the smallest file that can be planned."""

    def look(self) -> Generator[Event, None, None]:
        """Costs of every option of every matrix."""

    def work(self, budget: int | None = None) -> Generator[Event, None, None]:
        """All that takes time: costs, and what they come to.

        Raises:
            RecipeError: even the fewest bytes are more than ``budget``, known before measuring.
        """

    def useful(self) -> int:
        """Bytes of about the smallest plan that is of use, or of the least."""

    def fit(self, budget: int) -> Plan:
        """The settings that should cost least within ``budget`` bytes.

        Raises:
            RecipeError: even the least are too many.
        """

    def measured(self, made: Plan) -> Plan:
        """The plan with the KL that it has once applied, if there is text to measure on."""

    def best(self, budget: int) -> Generator[Event, None, Plan]:
        """The best plan within ``budget`` bytes as far as measuring tells, and its KL."""

    def refine(
        self, made: Plan, tries: int, seconds: float = math.inf
    ) -> Generator[Event, None, Plan]:
        """The best of ``tries`` other plans of the same size, begun within so many seconds."""

    def frontier(self, count: int) -> Generator[Event, None, list[Plan]]:
        """The best for ``count`` sizes."""
