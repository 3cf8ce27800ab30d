"""How much the loss depends on what each site puts out: by token, and by output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress import distributed


@dataclass
class Sensitivity:
    """Of one site, over the calibration text, g = ∂loss/∂output:

    tokens    for each forward pass float32 [tokens], the mean over outputs of g², mean 1 over all
    outputs   float32 [out, out], the second moment gᵀg / T
    """

    tokens: list[Tensor] = field(default_factory=list)
    outputs: Tensor = field(default_factory=lambda: torch.zeros(()))


def sensitivities(
    model: Any, forwards: Sequence[Callable[[nn.Module], Any]], names: Sequence[str]
) -> dict[str, Sensitivity]:
    """What the loss's gradient says of each site that it reaches; ``model`` is whole in memory.

    The loss is the negative log-likelihood of tokens drawn from the model's own prediction, so
    that the squares estimate the Fisher information (GuidedQuant, arXiv 2505.07004, with one
    group of output rows; K-FAC, arXiv 1503.05671).
    """
    found = {name: Sensitivity() for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, grad: tuple[Tensor, ...]) -> None:
            g = grad[0].detach().float().flatten(0, -2)
            found[name].tokens.append(g.square().mean(-1))
            found[name].outputs = found[name].outputs + g.T @ g

        return hook

    handles = [model.get_submodule(n).register_full_backward_hook(keep(n)) for n in names]
    random = torch.Generator().manual_seed(distributed.rank())
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
    return {name: one for name, one in found.items() if _scaled(one)}


def _scaled(one: Sensitivity) -> bool:
    """Sums to means, over all processes; whether gradients came to the site in each of them."""
    count = sum(len(t) for t in one.tokens)
    if not distributed.least(count):
        return False
    count = int(distributed.total(torch.tensor(count)))
    mean = distributed.total(torch.stack([t.sum() for t in one.tokens]).sum()) / count
    one.tokens = [t / mean.clamp(min=1e-30) for t in one.tokens]
    one.outputs = distributed.total(one.outputs) / count
    return True
