"""One pass over the windows, from which every quality metric is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import ModelError, NotMeasurable
from compress.objective import IGNORED, Examples
from eval.metrics.base import ANY_MODEL, Context
from eval.metrics.examples import from_context

LOGITS = 1 << 27  # logits of one forward pass, at most
CHUNK = 1 << 24  # logits that are float32 at one time, at most


@dataclass(frozen=True)
class Scores:
    """Sums over the predictions of each window, float64 [windows]; None where not measured.

    nll    −log p(target) in nats
    bytes  UTF-8 bytes of the targets
    kl     KL(original ‖ checkpoint) in nats
    agree  predictions whose most likely token is the original's
    count  predictions
    """

    count: Tensor
    nll: Tensor | None
    bytes: Tensor | None
    kl: Tensor | None
    agree: Tensor | None


def scores(context: Context, *, compare: bool = False) -> Scores:
    """The scores of ``context``, from one pass; a second only if the first did not ``compare``.

    Raises:
        NotMeasurable: the model has no logits over text, or there is no original to compare with.
    """
    found: Scores | None = context.cache.get("scores")
    if found is None or (compare and found.kl is None):
        if compare and context.original is None:
            raise NotMeasurable(
                f"{context.folder}: the original model is not known; name it with --baseline"
            )
        examples = from_context(context)
        found = run(
            examples,
            context.model,
            context.reference if compare else None,
            batch=context.settings.batch,
        )
        context.cache["scores"] = found
    return found


@torch.inference_mode()
def run(
    examples: Examples,
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    *,
    batch: int,
) -> Scores:
    """Both models see the same batches. Softmax in float32, sums in float64.

    Raises:
        NotMeasurable: the model's output has no logits that stand for a choice.
        ModelError: the two models choose among different numbers of things.
    """
    count = len(examples)
    size = _batch(examples, model, batch)
    sums = {name: torch.zeros(count, dtype=torch.float64)
            for name in ("count", "nll", "bytes", "kl", "agree")}  # fmt: skip
    for start in range(0, count, size):
        rows = slice(start, start + size)
        logits = _logits(examples, model, rows)
        theirs = logits
        if reference is not None and reference is not model:
            theirs = _logits(examples, reference, rows)
            if theirs.shape != logits.shape:
                raise ModelError(
                    f"the checkpoint's logits are {list(logits.shape)}, the original's are "
                    f"{list(theirs.shape)}; compare with a model of the same vocabulary"
                )
        for i in range(len(logits)):
            window = start + i
            ours, original, targets = logits[i], theirs[i] if reference is not None else None, None
            if examples.targets is not None and examples.token_bytes is not None:
                kept = (examples.targets[window] != IGNORED).nonzero()[:, 0]
                targets = examples.targets[window, kept]
                sums["bytes"][window] = examples.token_bytes[window, kept].sum()
                ours = ours[kept.to(ours.device)]
                original = original[kept.to(ours.device)] if original is not None else None
            part = _window(ours, targets, original)
            for name, value in part.items():
                sums[name][window] = value
    text, compared = examples.targets is not None, reference is not None
    return Scores(
        count=sums["count"],
        nll=sums["nll"] if text else None,
        bytes=sums["bytes"] if text else None,
        kl=sums["kl"] if compared else None,
        agree=sums["agree"] if compared else None,
    )


def _window(logits: Tensor, targets: Tensor | None, theirs: Tensor | None) -> dict[str, float]:
    """Sums over one window: logits [predictions, choices], of which a few at a time are float32."""
    sums = {"count": float(len(logits)), "nll": 0.0, "kl": 0.0, "agree": 0.0}
    step = max(1, CHUNK // logits.shape[-1])
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        log_p = logits[rows].float().log_softmax(-1)
        if targets is not None:
            chosen = targets[rows].to(log_p.device)
            sums["nll"] -= log_p.gather(1, chosen[:, None]).double().sum().item()
        if theirs is not None:
            log_q = theirs[rows].float().log_softmax(-1)
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
            sums["kl"] += kl.double().sum().item()
            sums["agree"] += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
    return sums


def _logits(examples: Examples, model: PreTrainedModel, rows: slice) -> Tensor:
    """[windows, positions, choices]; a model with one answer for a window has one position."""
    logits = getattr(examples.call(model, rows), "logits", None)
    name = type(model).__name__
    if logits is None:
        raise NotMeasurable(f"{name} gives no logits; it can be measured by {ANY_MODEL}")
    if logits.shape[-1] == 1:
        raise NotMeasurable(
            f"{name} gives a score, not a choice among tokens or classes; "
            f"it can be measured by {ANY_MODEL}"
        )
    return logits[:, None] if logits.dim() == 2 else logits


def _batch(examples: Examples, model: PreTrainedModel, wanted: int) -> int:
    if examples.targets is None:
        return 1  # decoders that classify refuse batches when they have no padding token
    vocabulary = model.config.get_text_config().vocab_size
    return max(1, min(wanted, LOGITS // (examples.targets.shape[1] * vocabulary)))
