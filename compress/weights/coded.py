"""Integers written in as few bits as their frequencies allow."""

from __future__ import annotations

import zlib

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from compress.weights.base import Weight, spec_of
from compress.weights.modeling_compressed import read_stream, unpack_codes
from compress.weights.quantized import Quantized


class Coded(Weight):
    """Entropy-coded integers: weight = code · step · 2^((row − 128)/8) · 2^((column − 128)/8).

    stream  uint8 [bytes], a raw deflate stream (RFC 1951) of Huffman codes alone, without matches;
            each of its symbols holds ``digits`` codes in base ``levels``, in row order
    row     uint8 [out]; steps may be coarse, since codes are chosen for the steps as they are
    column  uint8 [in]
    """

    kind = "coded"

    @classmethod
    def of(
        cls, codes: Tensor, row: Tensor, column: Tensor, step: float, dtype: torch.dtype
    ) -> Coded:
        """``codes`` [out, in], integers of at most 256 neighbouring values."""
        stream, numbers = encoded(codes)
        tensors = {"stream": stream, "row": row, "column": column}
        return cls(spec_of("coded", codes, dtype, **numbers, step=step), tensors)


class Huffman(Weight):
    """A ``Quantized`` whose codes are a stream like that of ``Coded``: the same numbers.

    stream             uint8 [bytes], instead of weight_packed
    weight_scale, weight_zero_point, weight_shape as they were
    """

    kind = "huffman"

    @classmethod
    def of(cls, weight: Quantized) -> Huffman:
        stream, numbers = encoded(unpack_codes(weight.spec, weight.tensors))
        tensors = {k: t for k, t in weight.tensors.items() if k != "weight_packed"}
        return cls(weight.spec | numbers | {"kind": "huffman"}, {"stream": stream, **tensors})

    def plain(self) -> Quantized:
        """The weight that this was made of, bit for bit."""
        codes = read_stream(self.spec, self.tensors).to(torch.int8)
        spec = {k: v for k, v in self.spec.items() if k not in ("low", "levels", "digits")}
        tensors = {k: t for k, t in self.tensors.items() if k != "stream"}
        packed = pack_to_int32(codes, spec["bits"])
        return Quantized(spec | {"kind": "quantized"}, {"weight_packed": packed, **tensors})


def encoded(codes: Tensor) -> tuple[Tensor, dict[str, int]]:
    """The shortest stream of codes, and the numbers that it takes to read it."""
    low = int(codes.min())
    levels = int(codes.max()) - low + 1
    stream, digits = encode(codes.int() - low, levels)
    return stream, {"low": low, "levels": levels, "digits": digits}


def encode(codes: Tensor, levels: int) -> tuple[Tensor, int]:
    """The shortest stream of ``codes``, integers in [0, levels), and how many share a symbol.

    Several do where levels are few: a Huffman code has at least a bit a symbol, whatever its
    frequency.
    """
    most = next(n for n in range(8, 0, -1) if max(2, levels) ** n <= 256)
    streams = {digits: _deflated(codes.flatten(), levels, digits) for digits in {1, 2, most}
               if digits <= most}  # fmt: skip
    digits = min(streams, key=lambda n: len(streams[n]))
    return torch.frombuffer(bytearray(streams[digits]), dtype=torch.uint8), digits


def _deflated(codes: Tensor, levels: int, digits: int) -> bytes:
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % digits)).view(-1, digits)
    symbols = (padded * levels ** torch.arange(digits)).sum(1).to(torch.uint8)
    press = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return press.compress(symbols.numpy().tobytes()) + press.flush()
