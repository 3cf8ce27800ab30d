"""Embedding models beside their original: are texts still where they were, and still neighbours?

The embedding of an example is the mean of the last hidden states over its tokens (patches, for an
image). Examples are windows of text, or the rows of a data set.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from compress.errors import ModelError, NotMeasurable
from compress.objective import Examples
from eval.metrics.base import Context, Metric
from eval.metrics.columns import documents, labels, parts
from eval.metrics.examples import from_context
from eval.metrics.quality import ratio
from eval.metrics.scores import batch_size
from eval.results import Result


class _Embedding(Metric):
    unit = "correlation"
    higher_is_better = True
    needs_reference = True
    needs_data = True

    def _mean(self, context: Context, values: Tensor) -> Result:
        owners = documents(context)
        value, stderr = ratio(values, torch.ones_like(values), owners)
        found = {}
        if context.reads_dataset:
            found = parts(labels(context), values[:, None], torch.ones_like(values)[:, None])
        return self.result(
            context, value, stderr=stderr, samples=values.tolist(), documents=owners, slices=found
        )


class EmbeddingCosine(_Embedding):
    """Mean cosine of an example's embedding and the original's embedding of it."""

    name = "embedding_cosine"
    unit = "cosine"

    def measure(self, context: Context) -> Result:
        ours, theirs = embeddings(context)
        if ours.shape != theirs.shape:
            raise ModelError(
                f"{context.folder}: embeddings of {ours.shape[1]} numbers, the original's have "
                f"{theirs.shape[1]}; only their neighbours can be compared (embedding_neighbours)"
            )
        return self._mean(context, (ours * theirs).sum(1))


class EmbeddingNeighbours(_Embedding):
    """Spearman's rank correlation of an example's cosines to all others, with the original's;
    the mean over examples. It says whether a search would find the same."""

    name = "embedding_neighbours"

    def measure(self, context: Context) -> Result:
        ours, theirs = embeddings(context)
        if len(ours) < 3:
            raise NotMeasurable(f"{context.folder}: neighbours need at least three examples")
        return self._mean(context, spearman(_others(ours @ ours.T), _others(theirs @ theirs.T)))


def embeddings(context: Context) -> tuple[Tensor, Tensor]:
    """Of the checkpoint and of its original, unit length, float64 [examples, width] each.

    Raises:
        NotMeasurable: there is no original, or the model has no hidden states to show.
    """
    if "embeddings" not in context.cache:
        if context.reference is None:
            raise NotMeasurable(
                f"{context.folder}: the original model is not known; name it with --baseline"
            )
        examples = from_context(context)
        ours = _embed(context, examples, context.model)
        same = context.reference is context.model
        theirs = ours if same else _embed(context, examples, context.reference)
        context.cache["embeddings"] = ours, theirs
    return context.cache["embeddings"]


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of the rows of a and b [n, m]; equal values share their mean rank."""
    ranks = [_ranks(values) for values in (a, b)]
    centred = [normalize(rank - rank.mean(1, keepdim=True), dim=1) for rank in ranks]
    return (centred[0] * centred[1]).sum(1)


def _ranks(values: Tensor) -> Tensor:
    """Mean of the ranks from the left and from the right."""
    ordered = values.sort(dim=1).values
    left = torch.searchsorted(ordered, values.contiguous())
    right = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (left + right - 1).double() / 2


def _others(square: Tensor) -> Tensor:
    """[n, n] without its diagonal, [n, n − 1]."""
    count = len(square)
    return square.flatten()[1:].view(count - 1, count + 1)[:, :-1].reshape(count, count - 1)


@torch.inference_mode()
def _embed(context: Context, examples: Examples, model: PreTrainedModel) -> Tensor:
    found = []
    size = batch_size(examples, model, context.settings.batch)
    for rows in context.batches(len(examples), size):
        hidden = getattr(examples.call(model, rows), "last_hidden_state", None)
        if hidden is None:
            raise NotMeasurable(
                f"{type(model).__name__} is no embedding model; it can be measured by kl"
            )
        kept = torch.ones(hidden.shape[:2])
        if "attention_mask" in examples.inputs:
            kept = examples.inputs["attention_mask"][rows, : hidden.shape[1]]
        weights = kept.to(hidden.device, torch.float64)[..., None]
        found.append(((hidden.double() * weights).sum(1) / weights.sum(1)).cpu())
    return normalize(torch.cat(found), dim=1)
