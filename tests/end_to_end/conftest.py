"""What applying tests share: one process that verifies, and a folder for each model asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import transformers

from compress import recipe as recipes
from compress import run as runs
from compress.verify import Verifier


@pytest.fixture(scope="session", autouse=True)
def _no_bars() -> None:
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``source("llama", hidden_size=48)``: the folder of that model, made once."""
    root = tmp_path_factory.mktemp("sources")
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = family + "".join(f"-{k}-{v}" for k, v in sorted(changes.items()))
        if key not in made:
            made[key] = models.save(root / key, family, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def verifier() -> Iterator[Verifier]:
    with Verifier() as started:
        yield started


@pytest.fixture
def apply(verifier: Verifier, text: str, tmp_path: Path) -> Callable[..., Path]:
    """``apply(model, stages, storage="compact")`` → the checkpoint folder, verified.

    Text is given to what trains; to calibrated methods with ``calibrated=True``.
    """

    def applied(
        model: Path,
        stages: list[dict[str, Any]],
        name: str = "out",
        calibrated: bool = False,
        **keys: Any,
    ) -> Path:
        recipe = {"model": str(model), "stages": stages, **keys}
        if calibrated or any("steps" in stage for stage in stages):
            recipe["calibration"] = {"data": text, "samples": 16}
        out = tmp_path / name
        runs.apply(recipes.load_one(recipe), out, verifier=verifier)
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(f".{name}")] == []
        return out

    return applied
