"""A stage that makes a model of another shape, and the source that the stages after it see."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from compress.compressors.base import StructureCompressor
from compress.compressors.structure.depth import Depth
from compress.compressors.structure.hidden import Hidden
from compress.compressors.structure.width import Width
from compress.errors import RecipeError
from compress.events import Event
from compress.narrowing import narrow
from compress.recipe import Recipe, Stage
from compress.shape import Reshaped
from compress.shortening import shorten
from compress.slicing import slim
from compress.source import Source
from compress.store import Blocks, Store


def restructure(
    number: int, stage: Stage, recipe: Recipe, source: Source, before: Blocks, store: Store
) -> Generator[Event, None, dict[str, Any]]:
    """Write every block of the new model to ``store``; returns the stage's report.

    Raises:
        ModelError: an architecture that cannot be cut so, as far as is known here.
    """
    compressor = stage.compressor
    if isinstance(compressor, Depth):
        return (yield from shorten(number, stage, recipe, source, before, store))
    if isinstance(compressor, Width):
        return (yield from narrow(number, stage, recipe, source, before, store))
    if isinstance(compressor, Hidden):
        return (yield from slim(number, stage, recipe, source, before, store))
    raise RecipeError(
        f"{stage.use}: only depth, width and hidden are known to change a model's shape"
    )


def followed(stage: Stage, report: dict[str, Any], source: Source) -> Source:
    """The model that later stages see after ``stage`` made its ``report``."""
    if not isinstance(stage.compressor, StructureCompressor):
        return source
    return Reshaped(source, **report["shape"])
