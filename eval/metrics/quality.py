"""How well a checkpoint predicts text, alone and against its original.

The five metrics read one pass over the evaluation windows (``scores.py``). Their standard errors
are of a ratio of sums (Cochran, Sampling Techniques, 1977, section 6.4) over the documents that
the windows are from, as in ``eval/compare.py``: for R = Σx / Σw over n documents, with residuals
e = x − R·w,  se = √(n / (n−1) · Σe²) / Σw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.errors import NotMeasurable
from eval.compare import by_document, spread
from eval.metrics.base import ANY_MODEL, Context, Metric
from eval.metrics.columns import documents, labels, parts
from eval.metrics.scores import Scores, scores
from eval.results import Result


class _Quality(Metric):
    needs_data = True

    def setup(self, context: Context) -> dict[str, Any]:
        return {"stride": context.settings.stride, "seed": context.settings.seed}

    def _mean(self, context: Context, values: Tensor, counts: Tensor) -> Result:
        """The mean over predictions; ``samples`` are the means of examples."""
        sums, weights = values.sum(1), counts.sum(1)
        owners = documents(context)
        value, stderr = ratio(sums, weights, owners)
        return self.result(
            context,
            value,
            stderr=stderr,
            samples=(sums / weights).tolist(),
            documents=owners,
            slices=parts(labels(context), values, counts),
        )


class NLL(_Quality):
    """Negative log-likelihood of the predicted tokens; ``samples`` are the means of windows."""

    name = "nll"
    unit = "nats/token"
    higher_is_better = False

    def measure(self, context: Context) -> Result:
        found = scores(context)
        return self._mean(context, _text(context, found)[0], found.count)


class Perplexity(_Quality):
    """exp(nll). It has no ``samples``: pairs of checkpoints are compared by their nll."""

    name = "perplexity"
    unit = "perplexity"
    higher_is_better = False

    def measure(self, context: Context) -> Result:
        found = scores(context)
        sums = _text(context, found)[0].sum(1)
        nll, stderr = ratio(sums, found.count.sum(1), documents(context))
        value = torch.tensor(nll, dtype=torch.float64).exp().item()  # inf, where math.exp raises
        return self.result(context, value, stderr=None if stderr is None else value * stderr)


class BitsPerByte(_Quality):
    """Bits to code one byte of text: comparable between tokenizers.

    ``samples`` are each window's bits over the mean bytes of a window, so that their mean is the
    value and their paired differences are differences of values.
    """

    name = "bits_per_byte"
    unit = "bits/byte"
    higher_is_better = False

    def measure(self, context: Context) -> Result:
        nll, size = (values.sum(1) for values in _text(context, scores(context)))
        bits = nll / math.log(2)
        owners = documents(context)
        value, stderr = ratio(bits, size, owners)
        samples = (bits / size.mean()).tolist()
        return self.result(context, value, stderr=stderr, samples=samples, documents=owners)


class KL(_Quality):
    """KL(original ‖ checkpoint) of the predicted distributions (of classes, for a classifier)."""

    name = "kl"
    unit = "nats/token"
    higher_is_better = False
    needs_reference = True

    def measure(self, context: Context) -> Result:
        found = scores(context, compare=True)
        assert found.kl is not None
        return self._mean(context, found.kl, found.count)


class Top1Agreement(_Quality):
    """Share of predictions whose most likely token (or class) is also the original's."""

    name = "top1_agreement"
    unit = "share"
    higher_is_better = True
    needs_reference = True

    def measure(self, context: Context) -> Result:
        found = scores(context, compare=True)
        assert found.agree is not None
        return self._mean(context, found.agree, found.count)


def ratio(
    values: Tensor, weights: Tensor, owners: Sequence[int] = ()
) -> tuple[float, float | None]:
    """Σ values / Σ weights and its standard error; float64 [examples] each.

    ``owners`` are the examples' documents. The standard error is None for a single example.
    """
    total = weights.sum()
    estimate = values.sum() / total
    if len(values) < 2:
        return estimate.item(), None
    residuals = (values - estimate * weights).tolist()
    return estimate.item(), spread(by_document(residuals, owners)) / total.item()


def _text(context: Context, found: Scores) -> tuple[Tensor, Tensor]:
    """nll and bytes of each prediction."""
    if found.nll is None or found.bytes is None:
        raise NotMeasurable(
            f"{type(context.model).__name__} predicts no tokens; it can be measured by kl, "
            f"top1_agreement, {ANY_MODEL}"
        )
    return found.nll, found.bytes
