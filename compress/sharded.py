"""Parameters spread over several processes by torch's FSDP2, and whole again.

``accelerate launch --use_fsdp``, or ACCELERATE_USE_FSDP=true under torchrun, asks for it. The
sharding is done here because accelerate's own knows no processors without an accelerator.
"""

from __future__ import annotations

import os

from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from compress import distributed


def wanted() -> bool:
    """Whether there are several processes, and whoever started them asked for sharding."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked and distributed.size() > 1


def shard(model: nn.Module) -> nn.Module:
    """Leave each process a share of every parameter; blocks are gathered as they run."""
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for block in reversed(blocks):
        fully_shard(block)
    fully_shard(model, reshard_after_forward=True)
    return model


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, in every process; all of them must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """``value``, whole, as this process is to hold it: on the device and with the share of
    ``parameter``."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def gather(model: nn.Module) -> None:
    """Give ``model`` whole parameters again, on the CPU; it cannot be run any more."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = whole(parameter.detach()).cpu()
                module._parameters[name] = nn.Parameter(full, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.cpu()
