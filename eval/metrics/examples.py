"""Evaluation windows as examples for a model, and made-up ones where only time matters."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import NotMeasurable
from compress.objective import Examples, causal, encoder_decoder, examples, family
from eval import labelled
from eval.metrics.base import Context


def from_context(context: Context, carried: Tensor | None = None) -> Examples:
    """The evaluation windows of ``context``, or its data set, as examples for its model.

    ``carried``, int64 [windows, length], is any number that belongs to each token: it takes the
    place of ``token_bytes`` and so is lined up with the targets as they are.

    Raises:
        NotMeasurable: the model does not read text, or not in the way the settings ask for.
    """
    if context.reads_dataset:
        return labelled.examples(
            context.labelled, context.model, context.tokenizer, context.processor
        )
    kind = family(context.model)  # says so first if the model does not read text at all
    tokens = context.windows.tokens
    sizes = context.windows.token_bytes if carried is None else carried
    stride = context.settings.stride
    if stride is None:
        seed = context.settings.seed
        return examples(context.model, tokens, sizes, context.tokenizer, seed=seed)
    if kind != "causal":
        raise NotMeasurable(
            f"{type(context.model).__name__}: sliding windows are for causal models; "
            "leave --stride out"
        )
    return causal(tokens, sizes, stride)


def made_up(model: PreTrainedModel, *, batch: int, length: int) -> Examples:
    """Random tokens of the model's vocabulary, where only time and memory matter.

    Raises:
        NotMeasurable: the model does not read text.
    """
    kind = family(model)
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (batch, length), generator=draw)
    if kind == "encoder-decoder":
        return encoder_decoder(tokens, torch.zeros_like(tokens), model)
    return Examples({"input_ids": tokens})
