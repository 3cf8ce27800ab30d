"""Integers on a grid: codes packed densely, a scale and maybe a zero-point per group."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from compress.weights.base import Weight, spec_of


class Quantized(Weight):
    """b-bit integers in the ``pack-quantized`` layout of compressed-tensors (as vLLM reads it).

    weight_packed      int32 [out, ⌈in·b/32⌉], 32 codes in b words
    weight_scale       [out, groups], 16-bit
    weight_zero_point  int32 [⌈out·b/32⌉, groups], absent when the grid is symmetric
    weight_shape       int64 [2]
    """

    kind = "quantized"

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        *,
        bits: int,
        group: int,
        dtype: torch.dtype,
    ) -> Quantized:
        """Pack ``codes`` [out, in] in [0, 2^bits), so that weight = (code − zero) · scale.

        scale [out, groups] in its storage dtype; zero [out, groups], integers in [0, 2^bits), or
        None for the symmetric grid, whose zero is 2^(bits−1).
        """
        half = 1 << (bits - 1)
        tensors = {
            "weight_packed": pack_to_int32((codes.int() - half).to(torch.int8), bits),
            "weight_scale": scale.contiguous(),
            "weight_shape": torch.tensor(codes.shape),
        }
        if zero is not None:
            offset = (zero.int() - half).to(torch.int8)
            tensors["weight_zero_point"] = pack_to_int32(offset, bits, packed_dim=0)
        spec = spec_of(
            "quantized",
            codes,
            dtype,
            bits=bits,
            group=min(group, codes.shape[1]),
            symmetric=zero is None,
        )
        return cls(spec, tensors)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scales of 16-bit models have the model's dtype; a float32 model gets float16 scales."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16
