"""Metrics of the Hugging Face `evaluate` library, on the tokens or classes a model predicts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl

import torch
import yaml

from compress.errors import NotMeasurable, RecipeError, first_line
from compress.objective import IGNORED
from eval.labelled import classes
from eval.metrics.base import Context, Metric
from eval.metrics.classification import predictions
from eval.metrics.columns import labels, parts
from eval.metrics.examples import from_context
from eval.results import Result

PREFIX = "evaluate:"
LOWER = {"wer", "cer", "ter", "mae", "mse", "mape", "smape", "mase", "perplexity", "brier_score"}
GROUPS = 200  # rows, or groups of rows, that the jackknife leaves out one at a time


class HuggingFaceMetric(Metric):
    """``evaluate:NAME``: NAME is a local metric script or folder, or one that the hub serves;
    ``evaluate:f1?average=macro`` gives it arguments.

    Of a model of text, predictions are the most likely tokens and references the tokens of the
    text; of a classifier, they are the classes of the data set's rows. Of several numbers that a
    metric returns, the first is the value and all stand in ``detail``.

    On a data set ``samples`` are the jackknife's pseudo-values n·θ − (n−1)·θ₋ᵢ of each row (Efron &
    Stein, Annals of Statistics 9, 1981): 1 or 0 for accuracy, and for F1 and the like what makes
    differences of two checkpoints paired, too.
    """

    unit = "score"
    needs_data = True

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]  # of the instance: a class serves many metrics
        self.path, _, arguments = name.removeprefix(PREFIX).partition("?")
        self.arguments = {key: yaml.safe_load(value) for key, value in parse_qsl(arguments)}
        stem = self.path.rstrip("/").rpartition("/")[2].removesuffix(".py")
        self.higher_is_better = stem not in LOWER  # type: ignore[misc]

    def setup(self, context: Context) -> dict[str, Any]:
        return {"seed": context.settings.seed}

    @torch.inference_mode()
    def measure(self, context: Context) -> Result:
        metric = self._load()
        if context.reads_dataset:
            return self._on_rows(context, metric)
        examples = from_context(context)
        if examples.targets is None:
            raise NotMeasurable(
                f"{type(context.model).__name__} does not predict text; give --dataset"
            )
        for rows in context.batches(len(examples), context.settings.batch):
            predicted = examples.call(context.model, rows).logits.argmax(-1).cpu()
            targets = examples.targets[rows]
            kept = targets != IGNORED
            metric.add_batch(predictions=predicted[kept], references=targets[kept])
        found = {key: float(value) for key, value in metric.compute(**self.arguments).items()}
        return self.result(context, next(iter(found.values())), detail=found)

    def _on_rows(self, context: Context, metric: Any) -> Result:
        predicted = predictions(context).tolist()
        wanted = classes(context.labelled, context.model.config).tolist()

        def compute(rows: Sequence[int]) -> dict[str, float]:
            answers = metric.compute(predictions=[predicted[i] for i in rows],
                                     references=[wanted[i] for i in rows],
                                     **self.arguments)  # fmt: skip
            return {key: float(value) for key, value in answers.items()}

        count = len(wanted)
        found = compute(range(count))
        name, value = next(iter(found.items()))
        groups = min(count, GROUPS)
        without = [compute([i for i in range(count) if i % groups != g])[name]
                   for g in range(groups)]  # fmt: skip
        samples = [round(groups * value - (groups - 1) * rest, 9) for rest in without]
        stderr = statistics.stdev(samples) / groups**0.5
        slices = {}
        if groups == count:
            column = torch.tensor(samples, dtype=torch.float64)[:, None]
            slices = parts(labels(context), column, torch.ones_like(column))
        return self.result(
            context, value, stderr=stderr, samples=samples, detail=found, slices=slices
        )

    def _load(self) -> Any:
        import evaluate

        try:
            return evaluate.load(self.path)
        except Exception as error:
            reason = first_line(error)
            raise RecipeError(
                f"metric '{self.name}' does not load ({reason}); without a network give the path "
                "of a metric script"
            ) from error
