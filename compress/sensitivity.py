"""How much the loss depends on what each site puts out: by token, and by output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress import distributed


@dataclass
class Sensitivity:
    """Of one site, over the calibration text, g = ∂loss/∂output:

    tokens    for each forward pass float32 [tokens], the mean over outputs of g², mean 1 over all
    outputs   float32 [out, out], the second moment gᵀg / T; of a head its diagonal [out]
    lookups   float32 [rows], how often an embedding's rows are looked up, a token
    """

    tokens: list[Tensor] = field(default_factory=list)
    outputs: Tensor = field(default_factory=lambda: torch.zeros(()))
    lookups: Tensor = field(default_factory=lambda: torch.zeros(()))


def sensitivities(
    model: Any,
    forwards: Sequence[Callable[[nn.Module], Any]],
    names: Sequence[str],
    heads: Sequence[str] = (),
) -> dict[str, Sensitivity]:
    """What the loss's gradient says of each site that it reaches; ``model`` is whole in memory.

    ``heads`` are sites too, with more outputs than a matrix of moments could be kept of.

    The loss is the negative log-likelihood of tokens drawn from the model's own prediction, so
    that the squares estimate the Fisher information (GuidedQuant, arXiv 2505.07004, with one
    group of output rows; K-FAC, arXiv 1503.05671).
    """
    names = [*names, *heads]
    found = {name: Sensitivity() for name in names}

    def keep(name: str) -> Callable[..., None]:
        def arrived(grad: Tensor) -> None:
            g = grad.detach().float().flatten(0, -2)
            found[name].tokens.append(g.square().mean(-1))
            moments = g.square().sum(0) if name in heads else g.T @ g
            found[name].outputs = found[name].outputs + moments

        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(arrived)

        return hook

    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    tables = {n: model.get_submodule(n) for n in names}
    counting = Lookups({n: t.weight for n, t in tables.items() if isinstance(t, nn.Embedding)})
    random = torch.Generator().manual_seed(distributed.rank())
    embedding = model.get_input_embeddings().weight  # a gradient of this makes all others flow
    embedding.requires_grad_(True)
    try:
        for forward in forwards:
            with counting:
                logits = forward(model).logits.float()
            chances = logits.detach().softmax(-1).flatten(0, -2)
            drawn = torch.multinomial(chances, 1, generator=random).flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), drawn, reduction="sum")
            loss.backward()
            embedding.grad = None
    finally:
        for handle in handles:
            handle.remove()
    for name, seen in counting.seen.items():
        found[name].lookups = seen
    return {name: one for name, one in found.items() if _scaled(one)}


class Lookups(TorchFunctionMode):
    """Counts which rows of tables are looked up: float32 [rows] each, in ``seen``.

    Where it happens and not as modules are called: positions may be worked out by the module.
    """

    def __init__(self, tables: dict[str, Tensor]) -> None:
        super().__init__()
        self.tables = tables
        self.seen: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.embedding:
            for name, table in self.tables.items():
                if args[1] is table:
                    counts = torch.bincount(args[0].flatten(), minlength=len(table)).float()
                    self.seen[name] = self.seen.get(name, 0) + counts
        return func(*args, **(kwargs or {}))


def _scaled(one: Sensitivity) -> bool:
    """Sums to means, over all processes; whether gradients came to the site in each of them."""
    count = sum(len(t) for t in one.tokens)
    if not distributed.least(count):
        return False
    count = int(distributed.total(torch.tensor(count)))
    mean = distributed.total(torch.stack([t.sum() for t in one.tokens]).sum()) / count
    one.tokens = [t / mean.clamp(min=1e-30) for t in one.tokens]
    one.outputs = distributed.total(one.outputs) / count
    one.lookups = distributed.total(one.lookups) / count
    return True
