"""One pass over the examples, from which every quality metric is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import ModelError, NotMeasurable
from compress.objective import IGNORED, Examples
from eval.labelled import Padded
from eval.metrics.base import ANY_MODEL, Context
from eval.metrics.examples import from_context

LOGITS = 1 << 27  # logits of one forward pass, at most
CHUNK = 1 << 24  # logits that are float32 at one time, at most


@dataclass(frozen=True)
class Scores:
    """What each prediction scored, float64 [windows, positions], 0 where nothing is predicted.

    count  1 where something is predicted
    nll    −log p(target) in nats; None where there are no targets, or no original
    bytes  UTF-8 bytes of the target
    kl     KL(original ‖ checkpoint) in nats
    agree  1 where the most likely token is the original's
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
        found = run(context, context.reference if compare else None)
        context.cache["scores"] = found
    return found


@torch.inference_mode()
def run(context: Context, reference: PreTrainedModel | None) -> Scores:
    """Both models see the same batches. Softmax in float32, sums in float64.

    Raises:
        NotMeasurable: the model's output has no logits that stand for a choice.
        ModelError: the two models choose among different numbers of things.
    """
    examples, model = from_context(context), context.model
    size = batch_size(examples, model, context.settings.batch)
    found: list[dict[str, Tensor]] = []
    for rows in context.batches(len(examples), size):
        logits = class_logits(examples, model, rows)
        theirs = logits
        if reference is not None and reference is not model:
            theirs = class_logits(examples, reference, rows)
            if theirs.shape != logits.shape:
                raise ModelError(
                    f"the checkpoint's logits are {list(logits.shape)}, the original's are "
                    f"{list(theirs.shape)}; compare with a model of the same vocabulary"
                )
        for i in range(len(logits)):
            targets = None if examples.targets is None else examples.targets[rows.start + i]
            found.append(_window(logits[i], targets, None if reference is None else theirs[i]))
    values = {name: torch.stack([window[name] for window in found]) for name in found[0]}
    counted = values["count"]
    size_of = examples.token_bytes if examples.targets is not None else None
    return Scores(
        count=counted,
        nll=values.get("nll"),
        bytes=None if size_of is None else size_of * counted,
        kl=values.get("kl"),
        agree=values.get("agree"),
    )


def _window(logits: Tensor, targets: Tensor | None, theirs: Tensor | None) -> dict[str, Tensor]:
    """Of one window: logits [positions, choices], of which a few at a time are float32."""
    places = torch.arange(len(logits))
    if targets is not None:
        places = (targets != IGNORED).nonzero()[:, 0]
    names = ["count", *(["nll"] if targets is not None else []),
             *(["kl", "agree"] if theirs is not None else [])]  # fmt: skip
    values = {name: torch.zeros(len(logits), dtype=torch.float64) for name in names}
    values["count"][places] = 1
    for rows in places.split(max(1, CHUNK // logits.shape[-1])):
        log_p = logits[rows.to(logits.device)].float().log_softmax(-1)
        if targets is not None:
            chosen = targets[rows].to(log_p.device)
            values["nll"][rows] = -log_p.gather(1, chosen[:, None])[:, 0].double().cpu()
        if theirs is not None:
            log_q = theirs[rows.to(theirs.device)].float().log_softmax(-1)
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
            values["kl"][rows] = kl.double().cpu()
            values["agree"][rows] = (log_p.argmax(-1) == log_q.argmax(-1)).double().cpu()
    return values


def class_logits(examples: Examples, model: PreTrainedModel, rows: slice) -> Tensor:
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
    if logits.dim() > 2 and isinstance(examples, Padded):
        raise NotMeasurable(f"{name} chooses for every token, not once for a row")
    return logits[:, None] if logits.dim() == 2 else logits


def batch_size(examples: Examples, model: PreTrainedModel, wanted: int) -> int:
    if examples.targets is None:  # decoders that classify without a padding token refuse batches
        reads_text = model.main_input_name == "input_ids"
        return 1 if reads_text and model.config.pad_token_id is None else wanted
    vocabulary = model.config.get_text_config().vocab_size
    return max(1, min(wanted, LOGITS // (examples.targets.shape[1] * vocabulary)))
