"""What takes a site's place while a model is traced to ONNX: modules that hold a weight as it is stored.

``torch.onnx.ops.symbolic`` stands for one node of onnxruntime, so packed weights are never unpacked
and the traced graph needs no rewriting. Plain matrices keep their own dtype; onnxruntime casts them
to float32 once, when it loads them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.export.base import Held
from compress.export.onnx_blocks import NBits, carried
from compress.weights import LowRank, Sum, Weight


class Plain(nn.Module):
    """x ↦ x · matrix [in, out] + bias."""

    def __init__(self, matrix: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.matrix.float()
        return y if self.bias is None else y + self.bias


class Table(nn.Module):
    """Rows of a matrix [rows, width] in any dtype; as a head, x ↦ x · matrixᵀ + bias."""

    def __init__(self, matrix: Tensor, bias: Tensor | None = None, *, head: bool = False) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("matrix", matrix)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.head:
            return functional.linear(x, self.matrix.float(), self.bias)
        return functional.embedding(x, self.matrix).float()


class Packed(nn.Module):
    """One ``MatMulNBits`` node; ``level`` 4 also rounds what it reads to 8 bits, a block at a time."""

    def __init__(self, weight: NBits, bias: Tensor | None, level: int) -> None:
        super().__init__()
        _hold(self, weight)
        self.register_buffer("bias", bias)
        rows, columns = weight.shape
        self.numbers = {
            "N": rows, "K": columns, "bits": weight.bits, "block_size": weight.block,
            "accuracy_level": level,
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x, self.codes, self.scale.float(), self.zero, None, self.bias]
        while inputs[-1] is None:
            inputs.pop()
        shape = (*x.shape[:-1], self.numbers["N"])
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits", inputs, self.numbers, dtype=x.dtype, shape=shape, version=1
        )


class PackedTable(nn.Module):
    """One ``GatherBlockQuantized`` node: rows of a packed matrix."""

    def __init__(self, weight: NBits) -> None:
        super().__init__()
        _hold(self, weight)
        self.width = weight.shape[1]
        self.padded = weight.block * weight.scale.shape[1]
        self.numbers = {
            "bits": weight.bits, "block_size": weight.block, "gather_axis": 0, "quantize_axis": 1
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x, self.codes.flatten(1), self.scale.float(), self.zero]
        inputs = [inputs[1], inputs[0], *inputs[2:]]
        if inputs[-1] is None:
            inputs.pop()
        rows = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized", inputs, self.numbers,
            dtype=torch.float32, shape=(*x.shape, self.padded), version=1,
        )  # fmt: skip
        return rows[..., : self.width]


class Added(nn.Module):
    """The sum of what several modules make of one input."""

    def __init__(self, *terms: nn.Module) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = (term(x) for term in self.terms)
        return sum(rest, first)


def linear(weight: Weight, bias: Tensor | None, level: int) -> nn.Module:
    """A module that computes x · weightᵀ + bias."""
    if isinstance(weight, Sum):
        first, *rest = weight.terms
        return Added(linear(first, bias, level), *(linear(term, None, level) for term in rest))
    if isinstance(weight, LowRank):
        return nn.Sequential(linear(weight.right, None, level), linear(weight.left, bias, level))
    packed = carried(weight)
    if packed is not None:
        return Packed(packed, bias, level)
    return Plain(_matrix(weight).T.contiguous(), bias)


def table(weight: Weight) -> nn.Module:
    """A module that looks rows up."""
    if isinstance(weight, Sum):
        return Added(*(table(term) for term in weight.terms))
    if isinstance(weight, LowRank):
        return nn.Sequential(table(weight.left), Plain(_matrix(weight.right), None))
    packed = carried(weight)
    return Table(_matrix(weight)) if packed is None else PackedTable(packed)


def head(table: nn.Module, weight: Weight, bias: Tensor | None, level: int) -> nn.Module:
    """An output head that is tied to ``table``, whose tensors it shares where both have the same."""
    if isinstance(table, Table):
        return Table(table.matrix, bias, head=True)
    module = linear(weight, bias, level)
    if isinstance(table, PackedTable) and isinstance(module, Packed):
        for name in ("codes", "scale", "zero"):
            module.register_buffer(name, getattr(table, name))
    return module


def held(weight: Weight) -> Held:
    """How ``linear`` and ``table`` hold a weight."""
    if isinstance(weight, LowRank):
        return max(held(weight.left), held(weight.right), key=("exactly", "expanded").index)
    if isinstance(weight, Sum):
        return max((held(term) for term in weight.terms), key=("exactly", "expanded").index)
    if weight.kind == "dense" or carried(weight) is not None:
        return "exactly"
    return "expanded"


def _matrix(weight: Weight) -> Tensor:
    return weight.dense().to(weight.dtype)


def _hold(module: nn.Module, weight: NBits) -> None:
    for name in ("codes", "scale", "zero"):
        module.register_buffer(name, getattr(weight, name))
