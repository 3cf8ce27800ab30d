"""Text that the student writes itself, to be corrected on it by the teacher (GKD, 2306.13649)."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.compressors.distillation.predictor import Batch, Predictor


def continued(student: Predictor, prompts: Tensor, length: int, seeds: list[int]) -> Tensor:
    """``prompts`` int64 [windows, tokens] continued to ``length`` tokens, drawn at temperature 1.

    Every window has a seed of its own, so that a batch in pieces is continued like a whole one.
    """
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    tokens, past, new = prompts, None, prompts
    with torch.no_grad():
        while tokens.shape[1] < length:
            batch = Batch({"input_ids": new}, new, {"use_cache": True})
            states, output = student.run(batch, past_key_values=past)
            past, logits = output.past_key_values, student.logits(states[:, -1]).float()
            uniform = torch.stack([torch.rand(logits.shape[1], generator=d) for d in draws])
            gumbel = -(-uniform.clamp_min(1e-20).log()).log()  # argmax(logits + it) is a draw
            new = (logits + gumbel.to(logits.device)).argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, new), 1)
    return tokens
