"""Metrics of the Hugging Face `evaluate` library, on the tokens or classes a model predicts."""

from __future__ import annotations

from typing import Any

import torch

from compress.errors import NotMeasurable, RecipeError
from compress.objective import IGNORED
from eval.metrics.base import Context, Metric
from eval.metrics.examples import from_context
from eval.results import Result

PREFIX = "evaluate:"


class HuggingFaceMetric(Metric):
    """``evaluate:NAME``: NAME is a local metric script or folder, or one that the hub serves.

    Predictions are the most likely tokens, references the tokens of the text. Of several numbers
    that a metric returns, the first is the value and all stand in ``detail``.
    """

    unit = "score"
    needs_data = True

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]  # of the instance: a class serves many metrics

    def setup(self, context: Context) -> dict[str, Any]:
        return {"seed": context.settings.seed}

    @torch.inference_mode()
    def measure(self, context: Context) -> Result:
        metric = self._load()
        examples = from_context(context)
        if examples.targets is None:
            raise NotMeasurable(f"{type(context.model).__name__} does not predict text")
        size = context.settings.batch
        for start in range(0, len(examples), size):
            rows = slice(start, start + size)
            predicted = examples.call(context.model, rows).logits.argmax(-1).cpu()
            targets = examples.targets[rows]
            kept = targets != IGNORED
            metric.add_batch(predictions=predicted[kept], references=targets[kept])
        found = {key: float(value) for key, value in metric.compute().items()}
        return self.result(context, next(iter(found.values())), detail=found)

    def _load(self) -> Any:
        import evaluate

        path = self.name.removeprefix(PREFIX)
        try:
            return evaluate.load(path)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise RecipeError(
                f"metric '{self.name}' does not load ({reason}); without a network give the path "
                "of a metric script"
            ) from error
