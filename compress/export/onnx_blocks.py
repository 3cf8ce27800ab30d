"""Weights as onnxruntime's ``MatMulNBits`` and ``GatherBlockQuantized`` hold them.

A row is cut into blocks of a power of two of neighbouring weights, which share a scale and maybe a
zero-point: weight = (code − zero) · scale, with codes of 2, 4 or 8 bits, the first in a byte's low
bits (ContribOperators.md of onnxruntime). A group of ours that is a whole number of blocks repeats
its scale in each of them, so every number moves over as it is; a grid of 3 bits takes nodes of 4,
one of 5 to 7 those of 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.export.gguf_blocks import grid
from compress.weights import Weight
from compress.weights.modeling_compressed import spread

# Measured, with activations of 8 bits: larger blocks are no faster, or have no kernel at 2 bits.
LARGEST = 128
SMALLEST = {2: 32, 4: 16, 8: 16}


@dataclass(frozen=True)
class NBits:
    """A matrix [out, in] in blocks along its rows.

    codes  uint8 [out, blocks, block · bits / 8]; the last block of a row may hold columns too many
    scale  [out, blocks], in the dtype in which the weight stores it
    zero   uint8 [out, ⌈blocks · bits / 8⌉], packed; None for the symmetric 2^(bits−1)
    """

    bits: int
    block: int
    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def carried(weight: Weight) -> NBits | None:
    """The weight's own codes and scales, or None where blocks do not fit its groups."""
    found = grid(weight)
    if found is None:
        return None
    codes, scale, zero, group = found
    rows, columns = codes.shape
    bits = _bits(codes, zero)
    block = _block(group if group < columns else LARGEST, columns, bits)
    if bits == 2 and block < SMALLEST[2]:
        bits, block = 4, _block(group, columns, 4)
    if block < SMALLEST[bits]:
        return None
    blocks = -(-columns // block)
    per_group = group // block if group < columns else blocks
    half = 1 << (bits - 1)
    padded = torch.nn.functional.pad(codes + half, (0, blocks * block - columns))
    return NBits(
        bits,
        block,
        (rows, columns),
        _packed(padded.view(rows, blocks, block), bits),
        spread(scale, per_group, blocks).contiguous(),
        _packed(spread(zero + half, per_group, blocks), bits) if zero.any() else None,
    )


def _bits(codes: Tensor, zero: Tensor) -> int:
    """The least bits of a node that has room for codes and zero-points, as it counts them."""
    low = min(int(codes.min()), int(zero.min()))
    high = max(int(codes.max()), int(zero.max()))
    return next(b for b in (2, 4, 8) if -(1 << (b - 1)) <= low and high < 1 << (b - 1))


def _block(group: int, columns: int, bits: int) -> int:
    """The largest power of two that divides ``group``, no larger than rows need."""
    room = max(SMALLEST[bits], 1 << (columns - 1).bit_length())
    return min(group & -group, LARGEST, room)


def _packed(values: Tensor, bits: int) -> Tensor:
    """uint8 [..., ⌈n · bits / 8⌉] of values [..., n] below 2^bits, the first in the low bits."""
    per_byte = 8 // bits
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % per_byte))
    shifts = torch.arange(per_byte) * bits
    parts = values.unflatten(-1, (-1, per_byte)) << shifts
    return parts.sum(-1).to(torch.uint8)
