"""Modules over packed matrices, and which matrix a stored weight becomes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compress.products import fast_products
from compress.runtime.matrices import DTYPE, Int4, Int8, Matrix, block_rows, kernel_group
from compress.weights import Coded, Huffman, LowRank, Masked, Quantized, Sum, Weight
from compress.weights import Int8 as StoredInt8
from compress.weights.modeling_compressed import (
    read_stream,
    round_tokens,
    unpack_codes,
    zero_points,
)

DENSITY = 0.25  # above it CSR takes more bytes than the matrix, and little less time


class NoKernel(Exception):
    """Why a weight is unpacked."""


class Plain(Matrix):
    """A matrix of numbers: a factor, or a term."""

    values: Tensor
    kernel = "dense"

    def __init__(self, weight: Tensor) -> None:
        super().__init__((weight.shape[0], weight.shape[1]))
        self.register_buffer("values", weight)

    def forward(self, x: Tensor) -> Tensor:
        with fast_products():
            return linear(x, self.values)


class Factors(Matrix):
    """left [out, rank] · right [rank, in], as two products."""

    kernel = "two products"

    def __init__(self, left: Matrix, right: Matrix) -> None:
        super().__init__((left.shape[0], right.shape[1]))
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.right(x))


class Added(Matrix):
    """A sum of matrices, as a sum of products."""

    def __init__(self, terms: list[Matrix]) -> None:
        super().__init__(terms[0].shape)
        self.terms = nn.ModuleList(terms)
        self.kernel = " + ".join(term.kernel for term in terms)

    def forward(self, x: Tensor) -> Tensor:
        total = self.terms[0](x)
        for term in self.terms[1:]:
            total = total + term(x)
        return total


class Columns(Matrix):
    """A matrix with a factor for each column, by which what it reads is multiplied."""

    factors: Tensor

    def __init__(self, matrix: Matrix, factors: Tensor) -> None:
        super().__init__(matrix.shape)
        self.matrix, self.kernel = matrix, matrix.kernel
        self.register_buffer("factors", factors.to(DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix(x * self.factors)

    def rows(self, ids: Tensor) -> Tensor:
        return self.matrix.rows(ids) * self.factors


class Csr(Matrix):
    """The numbers that are not zero, float32, row by row: torch's product of sparse matrices."""

    starts: Tensor
    columns: Tensor
    values: Tensor
    kernel = "csr"
    note = "csr: 100 tokens at once and more take up to half as long again as dense"

    def __init__(self, weight: Tensor) -> None:
        super().__init__((weight.shape[0], weight.shape[1]))
        density = int(weight.count_nonzero()) / weight.numel()
        self.few = 1 << 30 if density < 0.12 else 128
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that CSR is in beta state
            found = weight.float().to_sparse_csr()
        self.register_buffer("starts", found.crow_indices().int())
        self.register_buffer("columns", found.col_indices().int())
        self.register_buffer("values", found.values())

    def multiply(self, x: Tensor) -> Tensor:
        y = self._sparse() @ (x[0] if len(x) == 1 else x.T).float()
        return (y[None] if len(x) == 1 else y.T).to(x.dtype)

    def product(self, x: Tensor, start: int, end: int) -> Tensor:
        return linear(x, self._sparse(start, end).to_dense().to(x.dtype))

    def _sparse(self, start: int = 0, end: int | None = None) -> Tensor:
        starts = self.starts[start : None if end is None else end + 1]
        first, last = int(starts[0]), int(starts[-1])
        return torch.sparse_csr_tensor(
            starts - first, self.columns[first:last], self.values[first:last],
            size=(len(starts) - 1, self.shape[1]), check_invariants=False,
        )  # fmt: skip


def matrix_of(weight: Weight, dtype: torch.dtype) -> Matrix:
    """The matrix that computes with what is stored; numbers without a grid in ``dtype``.

    Raises:
        NoKernel: none does; the text is the reason.
    """
    if isinstance(weight, Quantized):
        return _integers(weight)
    if isinstance(weight, StoredInt8):
        return Int8(weight.tensors["codes"], weight.tensors["SCB"].float() / 127)
    if isinstance(weight, (Huffman, Masked)):
        return _integers(weight.plain())
    if isinstance(weight, Coded):
        return _coded(weight)
    if isinstance(weight, LowRank):
        return Factors(matrix_of(weight.left, dtype), matrix_of(weight.right, dtype))
    if isinstance(weight, Sum):
        return Added([matrix_of(term, dtype) for term in weight.terms])
    if weight.kind in ("dense", "sparse"):
        dense = weight.dense()
        return Csr(dense) if mostly_zeros(dense) else Plain(dense.to(dtype))
    raise NoKernel(f"torch has no kernel for {weight.kind}")


def mostly_zeros(dense: Tensor) -> bool:
    return int(dense.count_nonzero()) <= DENSITY * dense.numel()


def _integers(weight: Quantized) -> Matrix:
    spec, tensors, bits = weight.spec, weight.tensors, weight.spec["bits"]
    codes, scale = unpack_codes(spec, tensors), tensors["weight_scale"]
    if bits > 4 and scale.shape[1] == 1 and "weight_zero_point" not in tensors:
        return Int8(codes, scale[:, 0])
    half = 1 << (bits - 1)
    zero = torch.zeros_like(scale, dtype=torch.int16)
    if "weight_zero_point" in tensors:
        zero = zero_points(spec, tensors).to(torch.int16)
    return _int4((codes.short() + half).to(torch.uint8), scale, zero + half, spec["group"], bits)


def _int4(codes: Tensor, scale: Tensor, zero: Tensor, stored: int, bits: int) -> Int4:
    """In groups that the kernel takes, of the ``stored`` ones."""
    group, columns = kernel_group(stored, codes.shape[1]), codes.shape[1]
    if group is None:
        raise NoKernel(f"groups of {stored} are not multiples of 32")
    if not block_rows():
        raise NoKernel("this CPU's int4 kernel lays codes out in another way")
    groups = -(-columns // group)
    repeats = groups if stored >= columns else stored // group
    scale, zero = (t.repeat_interleave(repeats, dim=1)[:, :groups] for t in (scale, zero))
    return Int4(codes, scale, zero, group, bits)


def _coded(weight: Coded) -> Matrix:
    """Entropy-coded integers with their code undone: the kernels read 4 bits or 8."""
    spec, tensors = weight.spec, weight.tensors
    codes = read_stream(spec, tensors)
    row, column = (torch.exp2((tensors[name].float() - 128) / 8) for name in ("row", "column"))
    low, high = int(codes.min()), int(codes.max())
    scale = row * spec["step"]
    if high - low > 15:
        if low < -128 or high > 127:
            raise NoKernel("codes beyond 8 bits")
        return Columns(Int8(codes.to(torch.int8), scale), column)
    zero = 8 if low >= -8 and high <= 7 else -low
    unsigned = (codes + zero).to(torch.uint8)
    zeros = torch.full((len(codes), 1), zero)
    return Columns(_int4(unsigned, scale[:, None], zeros, codes.shape[1], 4), column)


class PackedLinear(nn.Module):
    """A Linear or Conv1D over a packed matrix."""

    def __init__(
        self, matrix: Matrix, bias: Tensor | None, dtype: torch.dtype, rounding: int | str | None
    ) -> None:
        """``rounding``: of every token that comes in, see ``round_tokens``."""
        super().__init__()
        self.matrix, self.rounding, self.dtype = matrix, rounding, dtype
        self.out_features, self.in_features = matrix.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        return stand_in(self.matrix, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.rounding is not None:
            x = round_tokens(x, self.rounding)
        y = self.matrix(x.reshape(-1, self.in_features))
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.matrix.kernel}"


class PackedEmbedding(nn.Module):
    """A table whose rows are decoded when they are looked up."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype
        self.num_embeddings, self.embedding_dim = matrix.shape

    @property
    def weight(self) -> Tensor:
        return stand_in(self.matrix, self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.rows(ids.flatten()).view(*ids.shape, self.embedding_dim)


def stand_in(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """What model code may ask for shape and dtype; to compute with it is an error."""
    return torch.empty(matrix.shape, dtype=dtype, device="meta")
