"""Integers written in as few bits as their frequencies allow."""

from __future__ import annotations

import zlib

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from compress.weights.base import Weight, spec_of
from compress.weights.modeling_compressed import read_stream, unpack_codes
from compress.weights.quantized import Quantized

STREAM = ("low", "levels", "digits", "rare")  # of a spec: what it takes to read its stream
OFTEN = 0.04  # share of rare codes beyond which they cannot pay


class Coded(Weight):
    """Entropy-coded integers: weight = code · step · 2^((row − 128)/8) · 2^((column − 128)/8).

    stream  uint8 [bytes], a raw deflate stream (RFC 1951) of Huffman codes alone, without matches;
            each of its symbols holds ``digits`` codes in base ``levels``, in row order. If there
            are ``rare`` codes beyond those levels, the last level stands for them in turn, and
            they follow the deflate stream as int16
    row     uint8 [out]; steps may be coarse, since codes are chosen for the steps as they are
    column  uint8 [in]
    """

    kind = "coded"

    @classmethod
    def of(
        cls, codes: Tensor, row: Tensor, column: Tensor, step: float, dtype: torch.dtype
    ) -> Coded:
        """``codes`` [out, in], integers of 16 bits."""
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
        spec = {k: v for k, v in self.spec.items() if k not in STREAM}
        tensors = {k: t for k, t in self.tensors.items() if k != "stream"}
        packed = pack_to_int32(codes, spec["bits"])
        return Quantized(spec | {"kind": "quantized"}, {"weight_packed": packed, **tensors})


def encoded(codes: Tensor) -> tuple[Tensor, dict[str, int]]:
    """The shortest stream of ``codes``, and the numbers that it takes to read it.

    A Huffman code has at least a bit a symbol, whatever its frequency, so where most codes are
    alike several share a symbol; a few far ones are then written apart.
    """
    low = int(codes.min())
    flat = codes.flatten().int() - low
    counts = torch.bincount(flat)
    streams = []
    for digits in (1, 2, 3, 4, 5, 8):
        most = int(256 ** (1 / digits) + 1e-9)  # levels of a symbol of so many digits
        if len(counts) <= most:
            streams.append((_deflated(flat, len(counts), digits), low, len(counts), digits, 0))
            continue
        kept = counts.unfold(0, most - 1, 1).sum(1)  # codes in every window of so many levels
        first = int(kept.argmax())
        rare = len(flat) - int(kept[first])
        if rare <= OFTEN * len(flat) or digits == 1:
            moved = flat - first
            apart = (moved < 0) | (moved >= most - 1)
            stream = _deflated(moved.where(~apart, most - 1), most, digits)
            stream += (flat[apart] + low).short().numpy().tobytes()
            streams.append((stream, low + first, most, digits, rare))
    stream, *numbers = min(streams, key=lambda found: len(found[0]))
    spec = dict(zip(STREAM, numbers, strict=True))
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8), spec


def _deflated(codes: Tensor, levels: int, digits: int) -> bytes:
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % digits)).view(-1, digits)
    symbols = (padded * levels ** torch.arange(digits, dtype=torch.int32)).sum(1).to(torch.uint8)
    press = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return press.compress(symbols.numpy().tobytes()) + press.flush()
