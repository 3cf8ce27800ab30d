"""bitsandbytes' own storage: LLM.int8 rows and NF4 blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.weights.base import Weight, spec_of


class Int8(Weight):
    """codes int8 [out, in]; SCB float32 [out], the absmax of each row."""

    kind = "int8"

    @classmethod
    def of(cls, matrix: Tensor, dtype: torch.dtype) -> Int8:
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, absmax, _ = int8_vectorwise_quant(matrix.to(torch.float16))
        return cls(spec_of("int8", matrix, dtype), {"codes": codes, "SCB": absmax})


class NF4(Weight):
    """codes uint8 [out·in/2, 1], two a byte; absmax per block and bitsandbytes' state."""

    kind = "nf4"

    @classmethod
    def of(cls, matrix: Tensor, dtype: torch.dtype, *, block: int, double_quant: bool) -> NF4:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(
            matrix.to(dtype).contiguous(),
            blocksize=block,
            compress_statistics=double_quant,
            quant_type="nf4",
        )
        tensors = {"codes": packed}
        for name, tensor in state.as_dict(packed=True).items():
            tensors["quant_state" if name.startswith("quant_state") else name] = tensor
        spec = spec_of("nf4", matrix, dtype, block=block, double_quant=double_quant)
        return cls(spec, tensors)
