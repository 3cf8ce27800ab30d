"""Shapes of the model between which a plan may choose first: fewer blocks, or narrower ones.

Each is what its own stage, ``depth`` or ``width``, makes of the original. It is a model like any
other, whose matrices are then planned, so a shape costs what its stage costs and no more is known
of it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from compress import registry
from compress.compressors.base import StructureCompressor
from compress.errors import RecipeError
from compress.events import Event
from compress.recipe import Recipe, Stage
from compress.shape import predicted
from compress.source import Original, Source
from compress.store import Blocks, Store
from compress.structure import followed, restructure

SHAPES = ("depth", "width")
AMOUNTS = (0.125, 0.25, 0.375, 0.5)  # shares that go


@dataclass(frozen=True)
class Shape:
    """The model that the planned stage finds.

    stages  what makes it of the original, nothing or one
    kl      to the original in nats a token, on text that plans do not read
    """

    source: Source
    blocks: Blocks
    stages: tuple[Stage, ...] = ()
    kl: float = 0.0

    @classmethod
    def whole(cls, source: Source) -> Shape:
        """The original's own."""
        return cls(source, Original(source))


def stages_of(uses: Iterable[str], source: Source, *, plain: bool = False) -> Iterator[Stage]:
    """The stages whose shapes are tried, each shape once; ``plain``: those that a config can say.

    Raises:
        ModelError: an architecture that cannot be cut so, as far as is known here.
    """
    seen = set()
    for use in uses:
        for amount in AMOUNTS:
            made = registry.get(use).model_validate({"amount": amount})
            assert isinstance(made, StructureCompressor)
            stage = Stage(compressor=made, targets=list(made.default_targets))
            try:
                after = predicted(stage, source)
            except RecipeError:  # so small a share that nothing goes
                continue
            if plain and hasattr(after.config, "compressed_shapes"):
                continue
            shapes = tuple((site.name, site.shape) for site in after.anatomy.sites)
            if shapes not in seen:
                seen.add(shapes)
                yield stage


def reshaped(
    stage: Stage, recipe: Recipe, source: Source, folder: Path
) -> Generator[Event, None, Shape]:
    """What ``stage`` makes, its blocks in ``folder``; what it costs is not known yet."""
    torch.manual_seed(recipe.seed * 1000)
    store = Store(folder)
    report = yield from restructure(0, stage, recipe, source, Original(source), store)
    return Shape(followed(stage, report, source), store, (stage,))
