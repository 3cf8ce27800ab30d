"""Products of bfloat16 on processors that have no instructions for them.

There torch multiplies matrices of bfloat16 ten to forty times more slowly than those of float32.
The same sums in float32, rounded once at the end, are what such instructions make, too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

PRODUCTS: frozenset[Callable[..., Any]] = frozenset((
    functional.linear, torch.addmm, torch.baddbmm, torch.bmm, torch.matmul, torch.mm,
    Tensor.addmm, Tensor.baddbmm, Tensor.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm,
))  # fmt: skip
PIECE = 1 << 17  # numbers that are widened at a time


@cache
def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in fast kernels, as torch itself asks."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fast_products() -> AbstractContextManager[Any]:
    """While open, products of bfloat16 on the CPU are computed in whatever is fast there.

    Models keep their dtype, and so do all tensors between products. Attention in one function
    (``scaled_dot_product_attention``) has kernels of its own, which are no slower.
    """
    return nullcontext() if has_bfloat16() else _InFloat32()


class _InFloat32(TorchFunctionMode):
    """Products of bfloat16 on the CPU are summed in float32 and rounded."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and _slow(args[0]) and not torch.is_grad_enabled():
            return _linear(*args, **kwargs)
        if func in PRODUCTS and args and _slow(args[0]):
            wide = [a.float() if isinstance(a, Tensor) else a for a in args]
            named = {k: a.float() if isinstance(a, Tensor) else a for k, a in kwargs.items()}
            return func(*wide, **named).bfloat16()
        return func(*args, **kwargs)


def _slow(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A few rows at a time, which stay in the cache."""
    wide, shift = weight.float(), None if bias is None else bias.float()
    rows = input.reshape(-1, input.shape[-1])
    made = rows.new_empty(len(rows), len(weight))
    step = max(64, PIECE // max(weight.shape))
    for start in range(0, len(rows), step):
        piece = slice(start, start + step)
        made[piece] = functional.linear(rows[piece].float(), wide, shift)
    return made.view(*input.shape[:-1], len(weight))
