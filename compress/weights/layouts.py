"""Integers on a grid in the layouts of GPTQ and AWQ checkpoints, which hold the same numbers.

Both keep a matrix by its inputs. GPTQ packs along the inputs, in the same words as
compressed-tensors, and version 1 stores zero-points less one; AWQ (its ``gemm`` version) packs
along the outputs, eight in a word and these in an order of its own.
"""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from compress.weights.base import Weight
from compress.weights.dense import Dense
from compress.weights.modeling_compressed import spread, unpack_codes, zero_points
from compress.weights.quantized import Quantized

WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output whose code is in each half byte, from the lowest
GPTQ_BITS = (2, 3, 4, 8)


def to_gptq(weight: Quantized) -> dict[str, Tensor]:
    """The tensors of a weight whose both sides are multiples of 32, in ``GPTQ_BITS`` bits.

    qweight int32 [in·b/32, out], qzeros int32 [groups, out·b/32], scales float16 [groups, out],
    g_idx int32 [in]; of the first version where the grid is symmetric, else of the second.
    """
    bits, group, (rows, columns) = weight.spec["bits"], weight.spec["group"], weight.shape
    scale = weight.tensors["weight_scale"]
    zero = torch.full((scale.shape[1], rows), -1, dtype=torch.int8)  # the half, less one
    if not weight.spec["symmetric"]:
        zero = zero_points(weight.spec, weight.tensors).T.contiguous()
    return {
        "qweight": weight.tensors["weight_packed"].T.contiguous(),
        "qzeros": pack_to_int32(zero, bits),
        "scales": scale.T.to(torch.float16).contiguous(),
        "g_idx": (torch.arange(columns) // group).to(torch.int32),
    }


def from_gptq(
    tensors: dict[str, Tensor], bits: int, group: int, version: int, dtype: torch.dtype
) -> Weight:
    """The weight [out, in] of a GPTQ module; with inputs in another order it is dense."""
    qweight, scale = tensors["qweight"], tensors["scales"]
    columns, rows = qweight.shape[0] * WORD // bits, qweight.shape[1]
    half = 1 << (bits - 1)
    codes = unpack_from_int32(qweight.T.contiguous(), bits, torch.Size((rows, columns))) + half
    shape = torch.Size((len(scale), rows))
    zero = unpack_from_int32(tensors["qzeros"], bits, shape).int() + half
    zero = (zero + (version == 1)).T
    group = columns if group < 0 else group
    natural = torch.arange(columns) // group
    index = tensors.get("g_idx", natural)
    if not torch.equal(index.long(), natural):
        values = (codes - zero[:, index.long()]) * scale.T.float()[:, index.long()]
        return Dense.of(values, dtype)
    return _on_grid(codes, scale.T, zero, bits, group, dtype)


def from_awq(tensors: dict[str, Tensor], group: int, dtype: torch.dtype) -> Weight:
    """The weight [out, in] of a 4-bit AWQ module."""
    codes, scale = _by_order(tensors["qweight"]).T, tensors["scales"].T
    group = codes.shape[1] if group < 0 else group
    return _on_grid(codes, scale, _by_order(tensors["qzeros"]).T, 4, group, dtype)


def _by_order(words: Tensor) -> Tensor:
    """int32 [n, out] of words int32 [n, out / 8]."""
    halves = (words[..., None] >> (4 * torch.arange(8, dtype=torch.int32))) & 15
    return halves[..., torch.tensor(AWQ_ORDER).argsort()].flatten(1)


def _on_grid(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, dtype: torch.dtype
) -> Weight:
    """Packed, where a zero-point has the bits for it."""
    if int(zero.max()) > (1 << bits) - 1:
        columns = codes.shape[1]
        return Dense.of(
            (codes - spread(zero, group, columns)) * spread(scale.float(), group, columns), dtype
        )
    even = bool((zero == 1 << (bits - 1)).all())
    kept = None if even else zero
    return Quantized.pack(codes, scale, kept, bits=bits, group=group, dtype=dtype)


def stored_bits(bits: int) -> int:
    """As many bits a code as GPTQ has a layout for."""
    return bits if bits in GPTQ_BITS else 8


def widened(weight: Quantized) -> Quantized:
    """The same numbers in ``stored_bits``."""
    if weight.spec["bits"] in GPTQ_BITS:
        return weight
    half = 1 << 7
    zero = (
        None if weight.spec["symmetric"] else zero_points(weight.spec, weight.tensors).int() + half
    )
    codes = unpack_codes(weight.spec, weight.tensors).int() + half
    scale, group = weight.tensors["weight_scale"], weight.spec["group"]
    return Quantized.pack(codes, scale, zero, bits=8, group=group, dtype=weight.dtype)
