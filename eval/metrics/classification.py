"""Classifiers of text and images on a data set with labels: the share of rows they get right.

How close they stay to the original, whatever the labels, is said by ``kl`` and ``top1_agreement``,
which read the same data set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import NotMeasurable
from eval.labelled import classes
from eval.metrics.base import Context, Metric
from eval.metrics.columns import labels, parts
from eval.metrics.examples import from_context
from eval.metrics.quality import ratio
from eval.metrics.scores import batch_size, class_logits
from eval.results import Result


class Accuracy(Metric):
    """Share of a data set's rows whose most likely class is the label; needs --dataset."""

    name = "accuracy"
    unit = "share"
    higher_is_better = True
    needs_data = True

    def measure(self, context: Context) -> Result:
        right = (predictions(context) == classes(context.labelled, context.model.config)).double()
        value, stderr = ratio(right, torch.ones_like(right))
        found = parts(labels(context), right[:, None], torch.ones_like(right)[:, None])
        return self.result(context, value, stderr=stderr, samples=right.tolist(), slices=found)


@torch.inference_mode()
def predictions(context: Context) -> Tensor:
    """The most likely class of each row of the data set, int64 [rows].

    Raises:
        NotMeasurable: there is no data set, or the model does not choose one class for a row.
    """
    if "predictions" not in context.cache:
        if len(context.labelled) < 2:
            raise NotMeasurable(f"{context.labelled.name} has fewer than two rows")
        examples = from_context(context)
        size = batch_size(examples, context.model, context.settings.batch)
        found = [
            class_logits(examples, context.model, rows)[:, 0].argmax(-1).cpu()
            for rows in context.batches(len(examples), size)
        ]
        context.cache["predictions"] = torch.cat(found)
    return context.cache["predictions"]
