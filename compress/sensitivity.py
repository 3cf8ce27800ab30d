"""How much the loss depends on what each site puts out, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def token_weights(
    model: Any, forwards: Sequence[Callable[[nn.Module], Any]], names: Sequence[str]
) -> dict[str, list[Tensor]]:
    """For each site and forward pass: float32 [tokens], mean over outputs of (∂loss/∂z)².

    The loss is the negative log-likelihood of tokens drawn from the model's own prediction, so
    that the squares estimate the Fisher information (GuidedQuant, arXiv 2505.07004, with one
    group of output rows). Scaled to a mean of 1 for each site.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, grad: tuple[Tensor, ...]) -> None:
            found[name].append(grad[0].detach().float().square().mean(-1).flatten())

        return hook

    handles = [model.get_submodule(n).register_full_backward_hook(keep(n)) for n in names]
    random = torch.Generator().manual_seed(0)
    embedding = model.get_input_embeddings().weight  # a gradient of this makes all others flow
    embedding.requires_grad_(True)
    try:
        for forward in forwards:
            logits = forward(model).logits.float()
            chances = logits.detach().softmax(-1).flatten(0, -2)
            drawn = torch.multinomial(chances, 1, generator=random).flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), drawn, reduction="sum")
            loss.backward()
            embedding.grad = None
    finally:
        for handle in handles:
            handle.remove()
    reached = {name: pieces for name, pieces in found.items() if pieces}
    for pieces in reached.values():
        mean = torch.cat(pieces).mean().clamp(min=1e-30)
        pieces[:] = [piece / mean for piece in pieces]
    return reached
