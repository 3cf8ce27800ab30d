"""Windows of text → what each family of models is fed, and which tokens it must predict.

Training and evaluation ask the same questions of a model, so both build them here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from compress.errors import DataError, NotMeasurable
from compress.products import fast_products

Family: TypeAlias = Literal["causal", "masked", "encoder-decoder", "other"]

IGNORED = -100  # in targets: nothing is predicted here
# Models whose first position is the one after the padding token's number.
COUNT_FROM_PADDING = ("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
                      "camembert", "longformer", "data2vec-text", "mpnet")  # fmt: skip
WINDOW = 256  # tokens, unless something else is asked for
MASKED_SHARE = 0.15  # as BERT was trained (arXiv 1810.04805)


@dataclass(frozen=True)
class Examples:
    """Inputs of a model and what is to be predicted, all windows together.

    inputs       int64 tensors [windows, …], given to the model by name
    options      other arguments of the forward call
    targets      int64 [windows, positions] aligned with the logits, IGNORED where nothing is
                 predicted; None for models that predict no tokens
    token_bytes  int64 [windows, positions], UTF-8 bytes of each target
    """

    inputs: dict[str, Tensor]
    targets: Tensor | None = None
    token_bytes: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def call(self, model: Any, rows: slice | Tensor) -> Any:
        """The output of ``model`` for some windows."""
        inputs = {name: ids[rows].to(model.device) for name, ids in self.inputs.items()}
        with fast_products():
            return model(**inputs, **self.options)


def family(model: Any) -> Family:
    """Which of the families of text models this is.

    Raises:
        NotMeasurable: the model does not read text.
    """
    name = type(model).__name__
    if model.main_input_name != "input_ids":
        raise NotMeasurable(
            f"{name} reads {model.main_input_name}, not text; text tells nothing of it"
        )
    if name.endswith("ForMaskedLM"):
        return "masked"
    generates = name.endswith(("ForCausalLM", "LMHeadModel")) or model.can_generate()
    if not generates:
        return "other"
    return "encoder-decoder" if model.config.is_encoder_decoder else "causal"


def context_length(config: Mapping[str, Any]) -> int | None:
    """The most tokens of text that a model takes at once, or None when its config does not say.

    ``config`` is the content of config.json. Of an encoder-decoder each half takes half a window.
    """
    own = config.get("text_config", config)
    for key in ("max_position_embeddings", "n_positions", "n_ctx"):
        if isinstance(own.get(key), int):
            if own.get("model_type") in COUNT_FROM_PADDING:
                return own[key] - (own.get("pad_token_id") or 0) - 1
            return own[key] * (2 if config.get("is_encoder_decoder") else 1)
    return None


def window_length(config: Mapping[str, Any], wanted: int | None = None) -> int:
    """``wanted``, or without a wish 256, or as many as the model takes.

    Raises:
        DataError: more is wanted than the model takes.
    """
    limit = context_length(config)
    if wanted is None:
        return min(WINDOW, limit or WINDOW)
    if limit is not None and wanted > limit:
        raise DataError(
            f"windows of {wanted} tokens, but the model takes {limit}; "
            f"choose a length of {limit} or less"
        )
    return wanted


def causal(tokens: Tensor, token_bytes: Tensor, stride: int | None = None) -> Examples:
    """Every token but the first is predicted from those before it in the window.

    With ``stride`` the windows overlap: they start ``stride`` tokens apart in the same running
    text, and only their last ``stride`` tokens are predicted.

    Raises:
        NotMeasurable: ``stride`` is not between 1 and length − 1.
    """
    length = tokens.shape[1]
    predicted = length - 1
    if stride is not None:
        if not 0 < stride < length:
            raise NotMeasurable(
                f"a stride of {stride} with windows of {length} tokens; "
                f"choose a stride from 1 to {length - 1}"
            )
        tokens = tokens.reshape(-1).unfold(0, length, stride)
        token_bytes = token_bytes.reshape(-1).unfold(0, length, stride)
        predicted = stride
    targets = torch.full_like(tokens, IGNORED)
    targets[:, length - 1 - predicted : -1] = tokens[:, length - predicted :]
    return Examples({"input_ids": tokens}, targets, token_bytes.roll(-1, 1), {"use_cache": False})


def masked(tokens: Tensor, token_bytes: Tensor, tokenizer: Any, seed: int = 0) -> Examples:
    """15% of the tokens of each window are hidden, drawn by the seed, and are predicted.

    The ends of a window are replaced by the tokenizer's first and last special tokens, which such
    models are used to; special tokens are never hidden.

    Raises:
        NotMeasurable: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise NotMeasurable("a masked language model needs a mask token and its tokenizer has none")
    inputs = tokens.clone()
    for column, token in ((0, tokenizer.cls_token_id), (-1, tokenizer.sep_token_id)):
        if token is not None:
            inputs[:, column] = token
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens.shape, generator=draw)
    free = ~torch.isin(inputs, torch.tensor(tokenizer.all_special_ids))
    chosen = order.where(free, -1).topk(max(1, round(MASKED_SHARE * tokens.shape[1])), dim=1)
    hidden = torch.zeros_like(free).scatter_(1, chosen.indices, True) & free
    targets = tokens.where(hidden, IGNORED)
    return Examples({"input_ids": inputs.masked_fill(hidden, tokenizer.mask_token_id)},
                    targets, token_bytes)  # fmt: skip


def encoder_decoder(tokens: Tensor, token_bytes: Tensor, model: Any) -> Examples:
    """The encoder reads the first half of a window; the decoder predicts the second."""
    half = tokens.shape[1] // 2
    targets = tokens[:, half:].contiguous()
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise NotMeasurable(f"{type(model).__name__} does not say how its decoder is fed")
    return Examples({"input_ids": tokens[:, :half], "decoder_input_ids": shift(targets)},
                    targets, token_bytes[:, half:], {"use_cache": False})  # fmt: skip


def examples(
    model: Any, tokens: Tensor, token_bytes: Tensor, tokenizer: Any, *, seed: int = 0
) -> Examples:
    """Windows of tokens int64 [windows, length] as ``model`` is to see them.

    Raises:
        NotMeasurable: the model does not read text.
    """
    kind = family(model)
    if kind == "causal":
        return causal(tokens, token_bytes)
    if kind == "masked":
        return masked(tokens, token_bytes, tokenizer, seed)
    if kind == "encoder-decoder":
        return encoder_decoder(tokens, token_bytes, model)
    return Examples({"input_ids": tokens})
