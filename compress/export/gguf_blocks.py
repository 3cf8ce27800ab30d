"""Weights as blocks of GGUF: which type holds our integers exactly, and the bytes in its layout.

A block is 32 neighbouring weights of a row, a 16-bit scale d, maybe a 16-bit minimum m, and codes:

    Q4_0   d·(c − 8)     c of 4 bits     18 bytes        Q4_1   d·c + m   20 bytes
    Q5_0   d·(c − 16)    c of 5 bits     22 bytes        Q5_1   d·c + m   24 bytes
    Q8_0   d·q           q of 8 bits     34 bytes

(ggml-common.h of llama.cpp; in a byte, the low half is a code of the block's first 16.) Our scales
are of 16 bits as well, so a grid whose groups are whole blocks moves over as it is, from bfloat16,
too, unless a scale is too small for float16. Only the minimum of a grid with zero-points, zero ·
scale, may have a bit too many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.export.base import Held
from compress.weights import Int8, Quantized, Weight
from compress.weights.modeling_compressed import spread, unpack_codes, zero_points

BLOCK = 32
NEARLY = 2**-10  # relative: what rounding a scale or a minimum to float16 may cost
SMALLEST = 2.0**-24  # of float16's numbers above 0


@dataclass(frozen=True)
class Blocks:
    """A matrix in a type of GGUF: uint8 [out, bytes of a row]."""

    type: str
    data: np.ndarray
    held: Held


def carried(weight: Weight) -> Blocks | None:
    """The weight's own codes and scales in the smallest type that has room for them, or None."""
    found = grid(weight)
    if found is None:
        return None
    codes, scale, zero, group = found
    columns = codes.shape[1]
    if columns % BLOCK or group % BLOCK:
        return None
    signed = codes - spread(zero, group, columns)
    low, high = int(signed.min()), int(signed.max())
    per_block = group // BLOCK
    d = scale.float().repeat_interleave(per_block, dim=1)[:, : columns // BLOCK]
    if low >= -8 and high <= 7:
        return _rounded("Q4_0", signed + 8, d)
    if low >= -16 and high <= 15 and int(codes.max() - codes.min()) > 15:
        return _rounded("Q5_0", signed + 16, d)
    start = int(codes.min())
    span = int(codes.max()) - start
    if zero.any() and span <= 31:
        least = (start - zero.float()) * scale.float()
        m = least.repeat_interleave(per_block, dim=1)[:, : columns // BLOCK]
        return _rounded("Q4_1" if span <= 15 else "Q5_1", codes - start, d, m)
    if low >= -128 and high <= 127:
        return _rounded("Q8_0", signed, d)
    return None


def grid(weight: Weight) -> tuple[Tensor, Tensor, Tensor, int] | None:
    """codes int32 [out, in], scale and zero [out, groups], group: weight = (code − zero)·scale."""
    if isinstance(weight, Int8):
        scale = weight.tensors["SCB"].float().view(-1, 1) / 127
        codes = weight.tensors["codes"].int()
        return codes, scale, torch.zeros_like(scale, dtype=torch.int32), codes.shape[1]
    if not isinstance(weight, Quantized):
        return None
    scale = weight.tensors["weight_scale"]
    codes = unpack_codes(weight.spec, weight.tensors).int()
    zero = torch.zeros(scale.shape, dtype=torch.int32)
    if "weight_zero_point" in weight.tensors:
        zero = zero_points(weight.spec, weight.tensors).int()
    return codes, scale, zero, weight.spec["group"]


def _rounded(kind: str, codes: Tensor, d: Tensor, m: Tensor | None = None) -> Blocks | None:
    """Blocks with scales and minima in float16; None where that loses more than ``NEARLY``."""
    held: Held = "exactly"
    for exact in (d, m):
        if exact is None:
            continue
        error = (exact.half().float() - exact).abs()
        if not (error <= NEARLY * exact.abs() + SMALLEST * 2**-10).all():
            return None
        if error.any():
            held = "nearly"
    return Blocks(kind, _laid_out(kind, codes, d.half(), None if m is None else m.half()), held)


def _laid_out(kind: str, codes: Tensor, d: Tensor, m: Tensor | None) -> np.ndarray:
    """uint8 [out, bytes]; codes [out, in] as the type counts them, d and m [out, blocks]."""
    blocks = codes.reshape(len(codes), -1, BLOCK)
    parts = [x.unsqueeze(-1).contiguous().view(torch.uint8) for x in (d, m) if x is not None]
    if kind == "Q8_0":
        parts.append(blocks.to(torch.int8).view(torch.uint8))
    else:
        if kind.startswith("Q5"):
            weights = 2 ** torch.arange(8, dtype=torch.int32)
            bits = (blocks >> 4).reshape(*blocks.shape[:2], 4, 8)
            parts.append((bits * weights).sum(-1).to(torch.uint8))
        low, high = (blocks & 15).split(BLOCK // 2, dim=-1)
        parts.append((low | high << 4).to(torch.uint8))
    return torch.cat(parts, dim=-1).flatten(1).numpy()


def plain(matrix: Tensor, dtype: torch.dtype) -> tuple[str, np.ndarray]:
    """A matrix as 16- or 32-bit numbers: the type's name and its bytes, uint8 [out, …]."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return names[dtype], matrix.to(dtype).contiguous().view(torch.uint8).numpy()
