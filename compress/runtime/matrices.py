"""Packed matrices [out, in] that multiply without being unpacked: what torch's CPU kernels take.

A few tokens (decoding) are bound by the bytes that are read, and the kernels read codes. Many
tokens (a prompt) are bound by arithmetic, in which a plain product is better: the matrix is decoded
a piece at a time into bfloat16, multiplied, and forgotten. All computing is in bfloat16.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from compress.products import fast_products

GROUPS = (256, 128, 64, 32)  # that the int4 kernel takes
PIECE = 3_000_000  # numbers decoded at a time
CHUNK = 1_000_000  # of these, that are in float32 at a time
DTYPE = torch.bfloat16


class Matrix(nn.Module):
    """A matrix [out, in] in some storage, in bfloat16 arithmetic.

    ``few``: up to so many tokens the kernel is faster than decoding. ``note``: where either is
    slower than a dense matrix in bfloat16 would be. Both were measured on one AVX512 core.
    """

    few: int
    kernel: str
    note: str | None = None

    def __init__(self, shape: tuple[int, int], multiple: int = 1) -> None:
        """Columns are filled up with zeros to a ``multiple``."""
        super().__init__()
        self.shape = shape
        self.missing = -shape[1] % multiple

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, in] · selfᵀ: [tokens, out]."""
        x = pad(x, (0, self.missing)) if self.missing else x
        if len(x) <= self.few:
            return self.multiply(x)
        with fast_products():
            pieces = [self.product(x, start, end) for start, end in self.pieces()]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def multiply(self, x: Tensor) -> Tensor:
        """The same by the kernel."""
        raise NotImplementedError

    def product(self, x: Tensor, start: int, end: int) -> Tensor:
        """The outputs of rows ``start`` to ``end`` by decoding these."""
        raise NotImplementedError

    def rows(self, ids: Tensor) -> Tensor:
        """Rows [len(ids), in] of a table."""
        raise NotImplementedError

    def pieces(self, multiple: int = 1) -> Iterator[tuple[int, int]]:
        step = max(1, PIECE // (self.shape[1] * multiple)) * multiple
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])


class Int8(Matrix):
    """codes int8 [out, in] and a scale for each row: ``_weight_int8pack_mm``."""

    codes: Tensor
    scale: Tensor
    few = 4
    kernel = "int8"
    note = "int8: 5 tokens at once and more take up to a quarter longer than dense"

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        """codes int8 [out, in]; scale [out]."""
        super().__init__((codes.shape[0], codes.shape[1]), 16)  # else the kernel reads beyond
        self.register_buffer("codes", pad(codes, (0, self.missing)).contiguous())
        self.register_buffer("scale", scale.to(DTYPE).contiguous())

    def multiply(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scale)

    def product(self, x: Tensor, start: int, end: int) -> Tensor:
        codes = self.codes[start:end]
        numbers = scratch("out", (codes.shape[0], codes.shape[1]), DTYPE, codes).copy_(codes)
        return linear(x, numbers).mul_(self.scale[start:end])

    def rows(self, ids: Tensor) -> Tensor:
        found = self.codes[ids].to(DTYPE) * self.scale[ids, None]
        return found[:, : self.shape[1]]


class Int4(Matrix):
    """Codes of up to 8 bits in groups, as one or two planes of 4 bits: ``_weight_int4pack_mm``.

    A plane is uint8 [blocks, in, block/2]: of the codes that the rows of a block have in a column,
    the first half lies in low nibbles, the second in high ones. weight = (code − 8)·scale + shift;
    with two planes it is the sum of both, the upper one with scales sixteen times as large. Rows
    are filled up to whole blocks, columns to whole groups.
    """

    plane0: Tensor
    scale0: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor, group: int, bits: int) -> None:
        """codes uint8 [out, in] below 2^bits; scale, zero [out, groups]; see ``kernel_group``.

        weight = (code − zero) · scale.
        """
        super().__init__((codes.shape[0], codes.shape[1]), group)
        block = block_rows()
        self.block, self.group = block, group
        middle = 8 if bits <= 4 else 128
        codes, zero = (t + (middle - (1 << (bits - 1))) for t in (codes, zero))
        self.symmetric = bool((zero == middle).all())
        rows = -codes.shape[0] % block
        codes = pad(codes, (0, self.missing, 0, rows))
        scale, zero = (pad(t.float(), (0, 0, 0, rows)).T for t in (scale, zero))
        planes = [codes] if bits <= 4 else [codes & 15, codes >> 4]
        shift = ((8 if bits <= 4 else 8 + 128) - zero) * scale
        self.planes = len(planes)
        self.few = 64 if self.planes == 1 else 24
        self.kernel = "int4" if self.planes == 1 else "int4 twice"
        self.note = (
            "int4: 20 to 500 tokens at once take up to twice as long as dense"
            if self.planes == 1
            else "int4 twice: 6 to 500 tokens at once take up to three times as long as dense"
        )
        for i, plane in enumerate(planes):
            factor = (scale * 16**i).to(DTYPE)
            part = shift.to(DTYPE)  # what 16 bits do not hold of it goes to the upper plane
            shift = shift - part.float()
            self.register_buffer(f"plane{i}", _laid_out(plane, block))
            self.register_buffer(f"scale{i}", torch.stack((factor, part), dim=-1))

    def multiply(self, x: Tensor) -> Tensor:
        rows = self.scale0.shape[1]
        total = None
        for i in range(self.planes):
            words = self.get_buffer(f"plane{i}").view(rows, -1)
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x, words, self.group, self.get_buffer(f"scale{i}")
            )
            total = y if total is None else total.add_(y)
        assert total is not None
        return total if rows == self.shape[0] else total[:, : self.shape[0]]

    def product(self, x: Tensor, start: int, end: int) -> Tensor:
        """``start`` is the first row of a block."""
        y = x @ self._decoded(start // self.block, -(-end // self.block))
        return y[:, : end - start]

    def pieces(self, multiple: int = 1) -> Iterator[tuple[int, int]]:
        return super().pieces(self.block)

    def _decoded(self, first: int, last: int) -> Tensor:
        """Blocks ``first`` to ``last``, transposed: [in, rows], in scratch memory.

        A few groups at a time, so that what lies between stays in the cache. Products are of
        float32, which torch multiplies and rounds in less time than it does bfloat16.
        """
        columns, rows = self.plane0.shape[1], (last - first) * self.block
        planes = [self.get_buffer(f"plane{i}")[first:last] for i in range(self.planes)]
        out = scratch("out", (columns, rows), DTYPE, planes[0])
        scale, shift = self._numbers(first * self.block, last * self.block)
        step = max(1, CHUNK // (rows * self.group)) * self.group
        for start in range(0, columns, step):
            end = min(start + step, columns)
            codes = _nibbles([plane[:, start:end] for plane in planes])
            if self.symmetric:
                codes = codes.sub_(8 if self.planes == 1 else 128).view(torch.int8)
            numbers = scratch("numbers", (end - start, rows), torch.float32, codes).copy_(codes)
            grouped = numbers.view(-1, self.group, rows)
            groups = slice(start // self.group, end // self.group)
            grouped.mul_(scale[groups])
            if not self.symmetric:
                grouped.add_(shift[groups])
            out[start:end].copy_(numbers)
        return out

    def _numbers(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """float32 [groups, 1, rows]: weight = code · scale + shift, for codes from zero on.

        Stored pairs are bfloat16, the upper half of float32; to pick every second number of a
        tensor takes torch much longer than to shift and mask pairs.
        """
        found = []
        for i in range(self.planes):
            pairs = self.get_buffer(f"scale{i}")[:, first:last].view(torch.int32)
            scale, shift = (
                scratch(f"{name}{i}", tuple(pairs.shape), torch.int32, pairs)
                for name in ("scale", "shift")
            )
            torch.bitwise_left_shift(pairs, 16, out=scale)
            torch.bitwise_and(pairs, -65536, out=shift)
            scale, shift = (t.view(torch.float32).squeeze(-1)[:, None] for t in (scale, shift))
            found.append((scale, shift.sub_(scale, alpha=8)))
        (scale, shift), *upper = found
        for _, more in upper:
            shift.add_(more)
        return scale, shift

    def rows(self, ids: Tensor) -> Tensor:
        half = self.block // 2
        block, place = ids // self.block, ids % self.block
        total = torch.zeros(len(ids), self.plane0.shape[1], device=ids.device)
        for i in range(self.planes):
            words = self.get_buffer(f"plane{i}")[block, :, place % half]
            codes = torch.where((place < half)[:, None], words & 15, words >> 4)
            found = self.get_buffer(f"scale{i}")[:, ids].float()  # [groups, rows, 2]
            scale, shift = (t.T.repeat_interleave(self.group, 1) for t in found.unbind(-1))
            total += (codes.float() - 8) * scale + shift
        return total[:, : self.shape[1]].to(DTYPE)


def kernel_group(group: int, columns: int) -> int | None:
    """The largest group of the kernel that fits into a weight's groups; None if there is none.

    A whole row may be cut anywhere, so it gets the largest with which nothing is filled up.
    """
    if group >= columns:
        whole = columns + -columns % GROUPS[-1]
        return next(g for g in GROUPS if whole % g == 0)
    return next((g for g in GROUPS if group % g == 0), None)


@cache
def block_rows() -> int:
    """Rows of a block in the layout of this CPU's int4 kernel; 0 if it is not the one known here.

    The layout depends on how wide vectors are, so a matrix whose codes spell its rows is laid out
    and looked at.
    """
    rows = torch.arange(64, dtype=torch.int32)
    codes = torch.stack((rows & 15, rows >> 4), dim=1)
    for block in (64, 32):
        try:
            laid = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        except (RuntimeError, AttributeError):
            return 0
        halves = laid.view(-1, 2, block // 2)
        found = torch.cat((halves & 15, halves >> 4), dim=-1).int()
        if torch.equal((found[:, 0] + 16 * found[:, 1]).flatten(), rows):
            return block
    return 0


def _laid_out(codes: Tensor, block: int) -> Tensor:
    """uint8 codes below 16 [rows, in] as the kernel wants them: [blocks, in, block/2]."""
    out = torch.empty(len(codes) // block, codes.shape[1], block // 2, dtype=torch.uint8)
    step = max(1, PIECE // (codes.shape[1] * block))
    for start in range(0, len(out), step):  # the kernel's own input has four bytes a code
        piece = codes[start * block : (start + step) * block].int()
        laid = torch.ops.aten._convert_weight_to_int4pack_for_cpu(piece, 1)
        out[start : start + step] = laid.view(-1, codes.shape[1], block // 2)
    return out


def _nibbles(planes: list[Tensor]) -> Tensor:
    """uint8 [in, rows] codes of one or two planes, uint8 [blocks, in, block/2], in scratch memory.

    Bytes are moved eight at a time, and on the way put into the order of rows.
    """
    blocks, columns, half = planes[0].shape
    found = []
    for i, plane in enumerate(planes):
        codes = scratch(f"codes{i}", (columns, blocks * 2 * half), torch.uint8, plane)
        words = codes.view(torch.int64).view(columns, blocks, 2, half // 8)
        words[:, :, 0] = plane.view(torch.int64).transpose(0, 1)
        torch.bitwise_right_shift(words[:, :, 0], 4, out=words[:, :, 1])
        words.bitwise_and_(0x0F0F0F0F0F0F0F0F)
        found.append(codes)
    if len(found) == 1:
        return found[0]
    lower, upper = found
    return upper.bitwise_left_shift_(4).bitwise_or_(lower)


_kept = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Memory for a piece, kept for the next: fresh pages take as long as decoding into them."""
    size = math.prod(shape)
    key = f"{name} {dtype} {like.device}"
    found = getattr(_kept, key, None)
    if found is None or found.numel() < size:
        with torch.inference_mode(False):  # else it could be written in that mode only
            found = torch.empty(size, dtype=dtype, device=like.device)
        setattr(_kept, key, found)
    return found[:size].view(shape)
