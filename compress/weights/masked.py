"""Integers on a grid of which many are zero: only the others are stored, and which they are."""

from __future__ import annotations

from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from compress.weights.base import Weight, spec_of
from compress.weights.modeling_compressed import masked_codes, unmasked, unpack_codes
from compress.weights.quantized import Quantized
from compress.weights.sparse import Sparse


class Masked(Weight):
    """A symmetric ``Quantized`` whose codes are zero where a mask is.

    mask           uint8 [out, ⌈in/8⌉], most significant bit first
    weight_packed  int32 [1, ⌈kept·b/32⌉], codes of the kept in row order
    weight_scale   [out, groups], 16-bit

    Bytes: sparsity s on b bits takes (1 − s)·b + 1 bits an entry, and the scales.
    """

    kind = "masked"

    @classmethod
    def of(cls, packed: Quantized, pruned: Sparse) -> Masked:
        """``packed`` with the mask of the weight that it was rounded from."""
        bits, mask = packed.spec["bits"], pruned.tensors["mask"]
        kept = unpack_codes(packed.spec, packed.tensors)[unmasked(mask, packed.shape[1])]
        tensors = {
            "mask": mask,
            "weight_packed": pack_to_int32(kept[None], bits),
            "weight_scale": packed.tensors["weight_scale"],
        }
        numbers = {"bits": bits, "group": packed.spec["group"], "kept": len(kept)}
        return cls(spec_of("masked", packed.dense(), packed.dtype, **numbers), tensors)

    def plain(self) -> Quantized:
        """The weight that this was made of, zeros stored."""
        codes = masked_codes(self.spec, self.tensors).int() + (1 << (self.spec["bits"] - 1))
        scale = self.tensors["weight_scale"]
        bits, group = self.spec["bits"], self.spec["group"]
        return Quantized.pack(codes, scale, None, bits=bits, group=group, dtype=self.dtype)

    @property
    def parameters(self) -> int:
        return self.spec["kept"]
