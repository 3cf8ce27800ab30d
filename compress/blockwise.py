"""Running a model whose weights are on disk: the only hooks in the library.

Each block is given its tensors right before it runs and loses them right after, so that memory
holds one block at a time, whatever the architecture does with its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.anatomy import Anatomy, Block
from compress.memory import give_back
from compress.store import Part


@contextmanager
def streamed(
    skeleton: nn.Module, anatomy: Anatomy, read: Callable[[int], Part], dtype: torch.dtype
) -> Iterator[nn.Module]:
    """``skeleton`` (parameters on the meta device), made runnable while the context is open.

    ``read(number)`` gives block ``number``; compressed weights run as the dense matrices they
    stand for, in ``dtype``.
    """
    handles = []

    def enter(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            fill(skeleton, anatomy, anatomy.blocks[number], read(number), dtype)

        return hook

    def leave(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            empty(skeleton, anatomy, anatomy.blocks[number])
            give_back()

        return hook

    try:
        fill(skeleton, anatomy, anatomy.blocks[0], read(0), dtype)
        for number, block in enumerate(anatomy.blocks[1:], start=1):
            module = skeleton.get_submodule(block.name)
            handles.append(module.register_forward_pre_hook(enter(number)))
            handles.append(module.register_forward_hook(leave(number)))
        yield skeleton
    finally:
        for handle in handles:
            handle.remove()
        for block in anatomy.blocks:
            empty(skeleton, anatomy, block)


def fill(model: nn.Module, anatomy: Anatomy, block: Block, part: Part, dtype: torch.dtype) -> None:
    """Put the tensors of ``part`` where ``model`` keeps them, floating ones in ``dtype``."""
    for name, tensor in dense_tensors(block, part).items():
        put(model, anatomy, name, tensor.to(dtype) if tensor.is_floating_point() else tensor)


def dense_tensors(block: Block, part: Part) -> dict[str, Tensor]:
    """Every tensor of a block as the original model would hold it."""
    tensors = dict(part.others)
    for site in block.sites:
        weight = part.weights[site.name]
        matrix = weight.dense().to(weight.dtype)
        tensors[site.parameter] = matrix.T.contiguous() if site.layout == "conv1d" else matrix
    return tensors


def empty(model: nn.Module, anatomy: Anatomy, block: Block) -> None:
    """Drop a block's parameters: they return to the meta device."""
    for name in block.tensors:
        owner, _, leaf = name.rpartition(".")
        parameter = model.get_submodule(owner)._parameters.get(leaf)
        if parameter is not None:
            put(model, anatomy, name, torch.empty_like(parameter, device="meta"))


def put(model: nn.Module, anatomy: Anatomy, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer, in every module that it is tied to."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
        return
    parameter = nn.Parameter(tensor, requires_grad=False)
    module._parameters[leaf] = parameter
    for alias, holder in anatomy.aliases.items():
        if holder == name:
            owner, _, leaf = alias.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = parameter
