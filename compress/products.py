"""Products of bfloat16 on processors that have no instructions for them.

There torch multiplies matrices of bfloat16 four times (AVX512) to forty times (AVX2) more slowly
than those of float32.
The same sums in float32, rounded once at the end, are what such instructions make, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# what is multiplied → the place of its first factor
PRODUCTS: dict[Callable[..., Any], int] = {
    functional.linear: 0, torch.matmul: 0, torch.mm: 0, torch.bmm: 0,
    Tensor.matmul: 0, Tensor.__matmul__: 0, Tensor.mm: 0, Tensor.bmm: 0,
    torch.addmm: 1, torch.baddbmm: 1, Tensor.addmm: 1, Tensor.baddbmm: 1,
}  # fmt: skip
FEW = 16  # rows: so few are bound by reading the other factor, of which float32 is twice as much
PIECE = 1 << 17  # numbers that are widened at a time


@cache
def has_bfloat16() -> bool:
    """Whether this processor has instructions that multiply bfloat16.

    oneDNN says so of all with AVX512, where it widens numbers by other instructions, four times as
    slowly as float32. Where torch was built without oneDNN and cannot tell, products stay as they
    are.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if supported is None:
        return True
    widens = _has("avx512") and not (_has("avx512_bf16") or _has("amx_tile"))
    return bool(supported()) and not widens


def _has(name: str) -> bool:
    """Whether torch knows of these instructions here."""
    known = getattr(torch.cpu, f"_is_{name}_supported", None)
    return known is not None and bool(known())


def fast_products() -> AbstractContextManager[Any]:
    """While open, products of bfloat16 on the CPU are computed in whatever is fast there.

    Models keep their dtype, and so do all tensors between products. Attention in one function
    (``scaled_dot_product_attention``) has kernels of its own, which are no slower.
    """
    return nullcontext() if has_bfloat16() else _InFloat32()


@contextmanager
def narrow_factors() -> Iterator[None]:
    """While open, products of float32 may read their factors as bfloat16: for factors that are.

    Of such factors nothing is lost; sums are in float32. oneDNN multiplies then, by bfloat16 where
    the processor has tiles (AMX), and in float32 with the full width of AVX512 on AMD's, of which
    MKL, torch's own choice, takes half. (Factors in bfloat16 have their sums rounded, too.)
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 and newer
    if matmul is None or not has_bfloat16():
        yield
        return
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _InFloat32(TorchFunctionMode):
    """Products of bfloat16 on the CPU are summed in float32 and rounded."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        place = PRODUCTS.get(func)
        if place is None or len(args) <= place or not _slow(args[place]):
            return func(*args, **kwargs)
        if func is functional.linear and not torch.is_grad_enabled():
            return _linear(*args, **kwargs)
        wide = [a.float() if isinstance(a, Tensor) else a for a in args]
        named = {k: a.float() if isinstance(a, Tensor) else a for k, a in kwargs.items()}
        return func(*wide, **named).bfloat16()


def _slow(factor: Tensor) -> bool:
    many = factor.numel() >= FEW * factor.shape[-1]
    return many and factor.dtype == torch.bfloat16 and factor.device.type == "cpu"


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
