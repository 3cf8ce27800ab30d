"""How well a checkpoint predicts text, alone and against its original.

The five metrics read one pass over the evaluation windows (``scores.py``). Their standard errors
are over windows, of a ratio of sums (Cochran, Sampling Techniques, 1977, section 6.4): for
R = Σx / Σw over n windows, with residuals e = x − R·w,  se = √(n / (n−1) · Σe²) / Σw.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compress.errors import NotMeasurable
from eval.metrics.base import ANY_MODEL, Context, Metric
from eval.metrics.scores import Scores, scores
from eval.results import Result


class _Quality(Metric):
    needs_data = True

    def setup(self, context: Context) -> dict[str, Any]:
        return {"stride": context.settings.stride, "seed": context.settings.seed}


class NLL(_Quality):
    """Negative log-likelihood of the predicted tokens; ``samples`` are the means of windows."""

    name = "nll"
    unit = "nats/token"
    higher_is_better = False

    def measure(self, context: Context) -> Result:
        found = scores(context)
        nll, _ = _text(context, found)
        value, stderr = ratio(nll, found.count)
        samples = (nll / found.count).tolist()
        return self.result(context, value, stderr=stderr, samples=samples)


class Perplexity(_Quality):
    """exp(nll). It has no ``samples``: pairs of checkpoints are compared by their nll."""

    name = "perplexity"
    unit = "perplexity"
    higher_is_better = False

    def measure(self, context: Context) -> Result:
        found = scores(context)
        nll, stderr = ratio(_text(context, found)[0], found.count)
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
        nll, size = _text(context, scores(context))
        bits = nll / math.log(2)
        value, stderr = ratio(bits, size)
        return self.result(context, value, stderr=stderr, samples=(bits / size.mean()).tolist())


class KL(_Quality):
    """KL(original ‖ checkpoint) of the predicted distributions (of classes, for a classifier)."""

    name = "kl"
    unit = "nats/token"
    higher_is_better = False
    needs_reference = True

    def measure(self, context: Context) -> Result:
        found = scores(context, compare=True)
        assert found.kl is not None
        value, stderr = ratio(found.kl, found.count)
        samples = (found.kl / found.count).tolist()
        return self.result(context, value, stderr=stderr, samples=samples)


class Top1Agreement(_Quality):
    """Share of predictions whose most likely token (or class) is also the original's."""

    name = "top1_agreement"
    unit = "share"
    higher_is_better = True
    needs_reference = True

    def measure(self, context: Context) -> Result:
        found = scores(context, compare=True)
        assert found.agree is not None
        value, stderr = ratio(found.agree, found.count)
        samples = (found.agree / found.count).tolist()
        return self.result(context, value, stderr=stderr, samples=samples)


def ratio(values: Tensor, weights: Tensor) -> tuple[float, float | None]:
    """Σ values / Σ weights and its standard error over windows; float64 [windows] each.

    The standard error is None for a single window.
    """
    count, total = len(values), weights.sum()
    estimate = values.sum() / total
    if count < 2:
        return estimate.item(), None
    residuals = values - estimate * weights
    return estimate.item(), ((count / (count - 1) * residuals.square().sum()).sqrt() / total).item()


def _text(context: Context, found: Scores) -> tuple[Tensor, Tensor]:
    """Sums of nll and of bytes."""
    if found.nll is None or found.bytes is None:
        raise NotMeasurable(
            f"{type(context.model).__name__} predicts no tokens; it can be measured by kl, "
            f"top1_agreement, {ANY_MODEL}"
        )
    return found.nll, found.bytes
