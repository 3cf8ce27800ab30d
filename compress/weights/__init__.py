"""How a weight matrix is stored: one class a kind."""

from compress.weights.base import Weight
from compress.weights.bitsandbytes import NF4, Int8
from compress.weights.coded import Coded, Huffman
from compress.weights.dense import Dense
from compress.weights.float8 import Float8
from compress.weights.lowrank import LowRank, Sum
from compress.weights.masked import Masked
from compress.weights.quantized import Quantized
from compress.weights.sparse import Sparse

__all__ = [
    "NF4",
    "Coded",
    "Dense",
    "Float8",
    "Huffman",
    "Int8",
    "LowRank",
    "Masked",
    "Quantized",
    "Sparse",
    "Sum",
    "Weight",
]
