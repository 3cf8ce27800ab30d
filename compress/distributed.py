"""Several processes on one job, as ``torchrun`` starts them, and how they agree.

Each runs its share of the calibration text; moments are summed over all, so that every process
solves the same problems with the same answers. The first one alone writes.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(days=2)  # others wait for as long as the first trains


def rank() -> int:
    """Number of this process; 0 is the one that writes, and the only one without a launcher."""
    return dist.get_rank() if _several() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _several() else 1


def total(tensor: Tensor) -> Tensor:
    """The sum of every process' ``tensor``."""
    if _several():
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
    return tensor


def largest(tensor: Tensor) -> Tensor:
    """Entry by entry, the largest that any process came with."""
    if _several():
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def least(number: int) -> int:
    """The smallest number that any process came with."""
    if not _several():
        return number
    shared = torch.tensor(number)
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return int(shared)


def agreed(number: int, otherwise: int) -> int:
    """The number that every process came with; ``otherwise`` if they are not the same."""
    low, high = least(number), -least(-number)
    return low if low == high else otherwise


def wait() -> None:
    """Until every process is here."""
    least(0)


def _several() -> bool:
    if not dist.is_available():
        return False
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return False
        cuda = ",cuda:nccl" if torch.cuda.is_available() else ""
        dist.init_process_group(f"cpu:gloo{cuda}", timeout=PATIENCE)
    return dist.get_world_size() > 1
