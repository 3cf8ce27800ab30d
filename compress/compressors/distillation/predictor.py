"""A model cut before its output head, so that logits are made a piece of the tokens at a time.

Logits are by far the largest thing in training: a vocabulary for every token. What the head reads
is as wide as the model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """What models are fed, and labels int64 [windows, positions] of what they must predict."""

    inputs: dict[str, Tensor]
    labels: Tensor
    options: dict[str, Any] = field(default_factory=dict)


class Predictor:
    """``run`` gives what the head reads, ``logits`` what it makes of it.

    A model that does more between the two (soft caps, scales) is found out by trying, on
    ``batch``; of such a one ``run`` gives the logits themselves.
    """

    def __init__(self, model: Any, batch: Batch) -> None:
        self.model = model
        self.head: Callable[[Tensor], Tensor] = lambda x: x
        head = model.get_output_embeddings()
        if head is not None and _is_last(model, head, batch):
            self.head = head

    def run(self, batch: Batch, **options: Any) -> tuple[Tensor, Any]:
        """[windows, positions, width], and the model's whole output."""
        given = batch.inputs | batch.options | options
        if not isinstance(self.head, nn.Module):
            output = self.model(**given)
            return output.logits, output
        with _spared(self.head) as read:
            output = self.model(**given)
        return read[0], output

    def logits(self, states: Tensor) -> Tensor:
        """[tokens, vocabulary] of states [tokens, width]."""
        return self.head(states)


@contextmanager
def _spared(head: nn.Module) -> Any:
    """Within, the head is given no token, and what it would have read is listed."""
    read: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read.append(inputs[0])
        return (inputs[0][..., :0, :], *inputs[1:])

    handle = head.register_forward_pre_hook(hook)
    try:
        yield read
    finally:
        handle.remove()


def _is_last(model: Any, head: nn.Module, batch: Batch) -> bool:
    """Whether the logits are what the head makes of what it reads, and nothing else."""
    with torch.no_grad():
        given = {name: tensor[:1] for name, tensor in batch.inputs.items()} | batch.options
        expected = model(**given).logits
        try:
            with _spared(head) as read:
                model(**given)
        except (RuntimeError, IndexError):
            return False
        if len(read) != 1 or read[0].shape[:-1] != expected.shape[:-1]:
            return False
        return torch.allclose(head(read[0]), expected, rtol=1e-3, atol=1e-4)
