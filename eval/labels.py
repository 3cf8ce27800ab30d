"""Where to write a name beside each point, so that names cover neither points nor each other.

Each name has a few places around its point, best first. Every name takes its cheapest place given
where the others are, and this is repeated a few times: for the dozen points of a report that is as
good as an exact search. Everything is in pixels, y downwards. A name that finds no free place is
left out: a name that cannot be read is worse than none, and hovering still tells it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LETTER, LINE = 6.4, 13.0  # mean width and height of a letter at the chart's 12 pixels
SWEEPS = 4
RANK = 4.0  # square pixels that one place further down the list of PLACES costs
HIDDEN = 2.5 * LETTER * LINE  # a name of which more than this is covered is left out


@dataclass(frozen=True)
class Box:
    """A rectangle; ``top`` < ``bottom``."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Shared area, in square pixels."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(across, 0.0) * max(down, 0.0)


@dataclass(frozen=True)
class Place:
    """Offset of a text's middle line from its point, and which end of the text sits there."""

    dx: float
    dy: float
    align: str

    def box(self, x: float, y: float, text: str) -> Box:
        """What ``text`` covers when its point is at (x, y)."""
        length = LETTER * len(text)
        left = x + self.dx - {"left": 0.0, "center": length / 2, "right": length}[self.align]
        return Box(left, y + self.dy - LINE / 2, left + length, y + self.dy + LINE / 2)


PLACES = [
    Place(9, 0, "left"),
    Place(-9, 0, "right"),
    Place(0, -14, "center"),
    Place(0, 14, "center"),
    Place(7, -10, "left"),
    Place(7, 10, "left"),
    Place(-7, -10, "right"),
    Place(-7, 10, "right"),
    Place(4, -19, "left"),
    Place(4, 19, "left"),
    Place(-4, -19, "right"),
    Place(-4, 19, "right"),
]


def place(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    obstacles: Sequence[Box],
    width: float,
    height: float,
) -> list[Place | None]:
    """A place for each text inside ``width`` × ``height``, or None where nothing is free."""
    dots = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    chosen: list[Place | None] = [None] * len(points)

    def covered(candidate: Place, index: int) -> float:
        box = candidate.box(*points[index], texts[index])
        names = [
            other.box(*points[i], texts[i])
            for i, other in enumerate(chosen)
            if other is not None and i != index
        ]
        inside = Box(0, 0, width, height).overlap(box)
        outside = (box.right - box.left) * LINE - inside
        others = sum(box.overlap(dot) for i, dot in enumerate(dots) if i != index)
        lines = sum(box.overlap(obstacle) for obstacle in obstacles)
        return 3 * outside + 2 * others + 2 * sum(map(box.overlap, names)) + lines

    for _ in range(SWEEPS):
        for index in range(len(points)):
            costs = [covered(p, index) + RANK * rank for rank, p in enumerate(PLACES)]
            chosen[index] = PLACES[costs.index(min(costs))]
    for index, candidate in enumerate(chosen):
        if candidate is not None and covered(candidate, index) > HIDDEN:
            chosen[index] = None
    return chosen
