"""Every recipe of recipes/, run on a tiny model with little text and few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest

from compress import recipe as recipes
from compress import run as runs
from compress.verify import Verifier

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
FEW = {"steps": 2, "samples": 8, "length": 16, "batch": 4, "rank": 4}


def small(stage: dict[str, Any]) -> dict[str, Any]:
    if stage["use"] == "depth":
        stage = stage | {"amount": 0.5}  # of two blocks
    return stage | {key: min(stage[key], value) for key, value in FEW.items() if key in stage}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(
    path: Path, text: str, verifier: Verifier, source: Callable[..., Path], tmp_path: Path
) -> None:
    seen: list[Any] = []
    for name, recipe in recipes.load(path).items():
        raw = recipe.dump()
        raw["model"] = str(source("llama", tie_word_embeddings=True))
        raw["calibration"] |= {"data": text, "samples": 8, "length": 16}
        raw["stages"] = [small(stage) for stage in raw["stages"]]
        if raw["stages"] in seen:
            continue
        seen.append(raw["stages"])
        runs.apply(recipes.load_one(raw), tmp_path / name, verifier=verifier)
        info = models.record(tmp_path / name)
        assert models.loaded_difference(tmp_path / name) < 0.05
        assert raw["stages"] == [] or info["bytes"]["ideal"] < info["bytes"]["original"]
