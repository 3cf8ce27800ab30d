"""What a checkpoint writes: greedy continuations of a few prompts, kept to be read by people."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.errors import NotMeasurable
from compress.objective import family
from eval.metrics.base import Context, Metric
from eval.results import Result

PYTHON_PROMPTS = ("import os\n\ndef ", "class Stack:\n    def __init__(self", "for i in range(")
PROMPT_TOKENS = 12  # of each of the first windows, when the text is not "demo"
PROMPTS = 3


@dataclass(frozen=True)
class Generation(Metric):
    """Mean share of the leading tokens that equal the original's; None without an original.

    ``detail`` holds ``texts``: a prompt and its completion each, and the original's completion.
    """

    tokens: int = 32

    name = "generation"
    unit = "share"
    higher_is_better = True
    beside_original = True
    needs_data = True

    def setup(self, context: Context) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def measure(self, context: Context) -> Result:
        kind = family(context.model)
        if kind not in ("causal", "encoder-decoder"):
            raise NotMeasurable(f"{type(context.model).__name__} does not write text")
        prompts = _prompts(context)
        written = [self._write(context.model, prompt) for prompt in prompts]
        decode = context.tokenizer.decode
        texts = [
            {"prompt": decode(prompt), "completion": decode(tokens)}
            for prompt, tokens in zip(prompts, written, strict=True)
        ]
        if context.original is None:
            return self.result(context, None, detail={"texts": texts})
        expected = self._expected(context, prompts, written)
        for text, tokens in zip(texts, expected, strict=True):
            text["original"] = decode(tokens)
        shares = [leading_share(a, b) for a, b in zip(written, expected, strict=True)]
        value = sum(shares) / len(shares)
        return self.result(context, value, samples=shares, detail={"texts": texts})

    def _expected(
        self, context: Context, prompts: list[list[int]], written: list[list[int]]
    ) -> list[list[int]]:
        """What the original writes, found once for all its checkpoints."""
        if context.is_original:
            return written
        key = (self.name, context.original, str(prompts))
        if key not in context.shared:
            assert context.reference is not None
            model = context.reference
            context.shared[key] = [self._write(model, prompt) for prompt in prompts]
        return context.shared[key]

    @torch.inference_mode()
    def _write(self, model: PreTrainedModel, prompt: list[int]) -> list[int]:
        """The tokens that follow ``prompt``, at most ``self.tokens``."""
        config = copy.deepcopy(model.generation_config)
        config.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
                      max_length=None, max_new_tokens=self.tokens)  # fmt: skip
        if config.pad_token_id is None:  # unused, there is no padding, but generate() wants one
            config.pad_token_id = 0
        ids = torch.tensor([prompt], device=model.device)
        write: Any = model.generate  # typed as a tensor or module, like all that torch looks up
        output = write(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        # A decoder behind an encoder starts from one token of its own, not from the prompt.
        start = 1 if model.config.is_encoder_decoder else len(prompt)
        return output[0, start:].tolist()


def leading_share(tokens: list[int], expected: list[int]) -> float:
    """Equal tokens before the first difference, over the longer length; 1 for equal texts."""
    longest = max(len(tokens), len(expected))
    equal = 0
    for a, b in zip(tokens, expected, strict=False):
        if a != b:
            break
        equal += 1
    return equal / longest if longest else 1.0


def _prompts(context: Context) -> list[list[int]]:
    if context.data == "demo":
        encode = context.tokenizer
        return [encode(text, add_special_tokens=False)["input_ids"] for text in PYTHON_PROMPTS]
    return context.windows.tokens[:PROMPTS, :PROMPT_TOKENS].tolist()
