"""A model in memory from the blocks on disk, and back: what training stages work on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from compress.anatomy import Site
from compress.blockwise import put
from compress.source import Source
from compress.store import Blocks, Part
from compress.weights import Dense, Weight
from compress.weights.modeling_compressed import attach, attach_alias


def assemble(source: Source, store: Blocks, dtype: torch.dtype) -> nn.Module:
    """The whole model in ``dtype``; sites with compressed weights decode them as they run."""
    model = source.new_skeleton()
    for number, block in enumerate(source.anatomy.blocks):
        part = store.read(number)
        for name, tensor in part.others.items():
            put(model, source.anatomy, name, _cast(tensor, dtype))
        for site in block.sites:
            weight = part.weights[site.name]
            if isinstance(weight, Dense):
                matrix = weight.dense().to(dtype)
                matrix = matrix.T.contiguous() if site.layout == "conv1d" else matrix
                put(model, source.anatomy, site.parameter, matrix)
                continue
            tensors = {name: _cast(tensor, dtype) for name, tensor in weight.tensors.items()}
            module = model.get_submodule(site.name)
            attach(module, weight.spec, tensors)
            module.__dict__["compute_dtype"] = dtype
            for alias in site.aliases:
                attach_alias(model.get_submodule(alias), module)
    return model.eval()


def take_back(
    model: nn.Module,
    source: Source,
    before: Part,
    number: int,
    finish: Callable[[nn.Module, Site, Weight], Weight],
) -> Part:
    """Block ``number`` as ``model`` now holds it, every tensor in the dtype it was stored in.

    ``finish(module, site, weight)`` gives each site's weight; tensors that the model no longer
    keeps under their name were not trained and stay as they were.
    """
    state = model.state_dict()
    others = {
        name: state[name].detach().cpu().to(old.dtype) if name in state else old
        for name, old in before.others.items()
    }
    weights = {
        site.name: finish(model.get_submodule(site.name), site, before.weights[site.name])
        for site in source.anatomy.blocks[number].sites
    }
    return Part(weights, others, list(before.records))


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
