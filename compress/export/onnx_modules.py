"""Modules that stand for sites while a model is traced to ONNX, with weights as they are stored.

``torch.onnx.ops.symbolic`` stands for one node of onnxruntime, so packed weights are never unpacked
and the traced graph needs no rewriting. Plain matrices keep their own dtype; onnxruntime casts them
to float32 once, when it loads them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.export import base
from compress.export.onnx_blocks import NBits, carried
from compress.weights import LowRank, Sum, Weight

DOMAIN = "com.microsoft"  # of onnxruntime's own nodes
UNLIKE = -7919  # any other constant in a graph, lest they be made one


class Plain(nn.Module):
    """x ↦ x · matrix [in, out] + bias."""

    matrix: Tensor
    bias: Tensor | None

    def __init__(self, matrix: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.matrix.float()
        return y if self.bias is None else y + self.bias


class Table(nn.Module):
    """Rows of a matrix [rows, width]; ``head``: x ↦ x · matrixᵀ + bias instead."""

    matrix: Tensor
    bias: Tensor | None

    def __init__(self, matrix: Tensor, bias: Tensor | None = None, *, head: bool = False) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("matrix", matrix)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.head:
            return functional.linear(x, self.matrix.float(), self.bias)
        return functional.embedding(x, self.matrix).float()


class Held(nn.Module):
    """A packed matrix: codes, scale and zero as in ``NBits``."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, weight: NBits) -> None:
        super().__init__()
        for name in ("codes", "scale", "zero"):
            self.register_buffer(name, getattr(weight, name))
        self.shape = weight.shape
        self.numbers: dict[str, Any] = {"bits": weight.bits, "block_size": weight.block}


class Packed(Held):
    """One ``MatMulNBits`` node; at ``level`` 4 it rounds each block that it reads to 8 bits."""

    bias: Tensor | None

    def __init__(self, weight: NBits, bias: Tensor | None, level: int) -> None:
        super().__init__(weight)
        self.register_buffer("bias", bias)
        self.numbers |= {"N": self.shape[0], "K": self.shape[1], "accuracy_level": level}

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x, self.codes, self.scale.float(), self.zero, None, self.bias]
        return _node("MatMulNBits", inputs, self.numbers, (*x.shape[:-1], self.shape[0]))


class PackedTable(Held):
    """One ``GatherBlockQuantized`` node: rows of a packed matrix."""

    def forward(self, x: Tensor) -> Tensor:
        inputs = [self.codes.flatten(1), x, self.scale.float(), self.zero]
        numbers = self.numbers | {"gather_axis": 0, "quantize_axis": 1}
        width = self.scale.shape[1] * self.numbers["block_size"]
        rows = _node("GatherBlockQuantized", inputs, numbers, (*x.shape, width))
        return rows[..., : self.shape[1]]


class Last(nn.Module):
    """A head that reads tokens from ``first`` on, which becomes an input of the graph."""

    first: Tensor
    end: Tensor
    axis: Tensor

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("first", torch.tensor([UNLIKE]))
        self.register_buffer("end", torch.tensor([torch.iinfo(torch.int64).max]))
        self.register_buffer("axis", torch.tensor([1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_node("Slice", [x, self.first, self.end, self.axis], {}, x.shape, "", 18))


def _node(
    name: str, inputs: list[Tensor | None], numbers: dict[str, Any], shape: Any,
    domain: str = DOMAIN, version: int = 1,
) -> Tensor:  # fmt: skip
    """One node, of onnxruntime's own unless told; in torch its output is zeros."""
    while inputs[-1] is None:
        inputs.pop()
    return torch.onnx.ops.symbolic(
        f"{domain}::{name}", inputs, numbers, dtype=torch.float32, shape=shape, version=version
    )


class Added(nn.Module):
    """The sum of what several modules make of one input."""

    def __init__(self, *terms: nn.Module) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = (term(x) for term in self.terms)
        return sum(rest, first)


def with_face(stand_in: nn.Module, module: nn.Module) -> nn.Module:
    """``stand_in`` with what model code asks of ``module`` beside calling it: sizes, and a weight
    for its dtype."""
    for name in ("num_embeddings", "embedding_dim", "padding_idx", "in_features", "out_features"):
        if hasattr(module, name):
            setattr(stand_in, name, getattr(module, name))
    stand_in.weight = torch.empty(0)
    return stand_in


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
    """An output head that is tied to ``table`` and shares its tensors."""
    if isinstance(table, Table):
        return Table(table.matrix, bias, head=True)
    module = linear(weight, bias, level)
    if isinstance(table, PackedTable) and isinstance(module, Packed):
        for name in ("codes", "scale", "zero"):
            module.register_buffer(name, getattr(table, name))
    return module


def held(weight: Weight) -> base.Held:
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
