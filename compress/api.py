"""The Python face of what the command line does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress import recipe as recipes
from compress import run as runs
from compress.compressors.base import Compressor
from compress.recipe import Recipe


def apply(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path,
    model: str | None = None,
    data: str | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> dict[str, Any]:
    """Apply a recipe (file, mapping or Recipe) and write the checkpoint folder ``out``.

    ``verify`` False writes it without having loaded it whole, which takes the model's memory.
    Returns what ``compression.json`` says: bytes, and method, error and bytes of every site.

    Raises:
        CompressError: anything the caller can put right; nothing is left at ``out`` then.
    """
    given = {"model": model, "calibration.data": data, "seed": seed}
    overrides = {k: v for k, v in given.items() if v is not None}
    if isinstance(recipe, Recipe):
        recipe = recipe.dump()
    loaded = recipes.load_one(recipe, overrides)
    return runs.apply(loaded, Path(out), overwrite=overwrite, verify=verify)


def compressor(name: str, **parameters: Any) -> Compressor:
    """A compressor by its name in recipes, e.g. ``compressor("rtn", bits=4)``."""
    stage = recipes.load_one({"stages": [{"use": name, **parameters}]}).stages[0]
    return stage.compressor
