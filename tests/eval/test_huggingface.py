"""Metrics of the `evaluate` library: a local script, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import RecipeError
from eval.harness import evaluate
from eval.metrics import get
from eval.results import Result

SCRIPT = """
import datasets
import evaluate


class Accuracy(evaluate.Metric):
    def _info(self):
        kinds = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=datasets.Features(kinds)
        )

    def _compute(self, predictions, references):
        right = sum(p == r for p, r in zip(predictions, references))
        return {"accuracy": right / len(predictions), "count": len(predictions)}
"""


def test_a_local_script_measures_the_demo_model(tmp_path: Path) -> None:
    script = tmp_path / "my_accuracy.py"
    script.write_text(SCRIPT)
    events = list(evaluate(["demo"], [f"evaluate:{script}"], samples=4, length=64))
    (row,) = [event for event in events if isinstance(event, Result)]
    assert row.detail["count"] == 4 * 63
    assert row.value == row.detail["accuracy"]
    assert 0.1 < row.value < 0.9


def test_a_script_that_is_not_there_is_one_clear_error() -> None:
    metric = get("evaluate:/nowhere/accuracy.py")
    with pytest.raises(RecipeError, match="accuracy\\.py' does not load"):
        metric._load()  # type: ignore[attr-defined]
