"""Kinds of storage against slow decoders: packed integers, sparse, NF4, int8, factors, sums."""

from __future__ import annotations

import json
from typing import Literal

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, quantize_4bit
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from tiny import normal
from torch import Tensor

from compress.compressors.pruning.masks import keep_n_of_m, keep_share
from compress.errors import RecipeError
from compress.testing import starting_weight
from compress.weights import NF4, Dense, Int8, LowRank, Quantized, Sparse, Sum, Weight

SHAPES = [(1, 1), (3, 5), (7, 33), (16, 64), (5, 100), (33, 31)]


def packed(
    rows: int, columns: int, bits: int, group: int, symmetric: bool
) -> tuple[Quantized, Tensor, Tensor, Tensor | None]:
    random = torch.Generator().manual_seed(bits + columns)
    groups = -(-columns // group)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=random)
    scale = (torch.rand(rows, groups, generator=random) + 0.1).half()
    zero = None if symmetric else torch.randint(0, 2**bits, (rows, groups), generator=random)
    weight = Quantized.pack(codes, scale, zero, bits=bits, group=group, dtype=torch.float16)
    return weight, codes, scale, zero


def unpack_slowly(words: Tensor, bits: int, count: int) -> list[int]:
    """Codes of one row of packed words, each bit looked up on its own; lowest bit first."""
    stream = [(int(word) >> i) & 1 for word in words for i in range(32)]
    return [sum(stream[k * bits + i] << i for i in range(bits)) for k in range(count)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_integers_decode_to_the_formula(
    shape: tuple[int, int], bits: int, symmetric: bool
) -> None:
    rows, columns = shape
    weight, codes, scale, zero = packed(rows, columns, bits, 8, symmetric)
    decoded = weight.dense()
    for i in range(rows):
        for j in range(0, columns, 3):
            z = 2 ** (bits - 1) if zero is None else int(zero[i, j // 8])
            assert decoded[i, j] == (int(codes[i, j]) - z) * float(scale[i, j // 8])


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_lie_end_to_end_and_words_hold_no_waste(bits: int) -> None:
    weight, codes, _, _ = packed(3, 45, bits, 8, True)
    words = weight.tensors["weight_packed"]
    assert words.shape == (3, -(-45 * bits // 32))
    for row, expected in zip(words, codes, strict=True):
        assert unpack_slowly(row, bits, 45) == expected.tolist()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_packed_integers_equal_what_compressed_tensors_reads(bits: int, symmetric: bool) -> None:
    weight, *_ = packed(24, 64, bits, 16, symmetric)
    arguments = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=16
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format="pack-quantized")
    theirs = PackedQuantizationCompressor.decompress(dict(weight.tensors), scheme)
    assert torch.equal(theirs["weight"].float(), weight.dense().half().float())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("per", ["layer", "row"])
def test_keep_share_against_sorting_by_hand(per: Literal["layer", "row"], sparsity: float) -> None:
    W = (normal(9, 21) * 40).round() / 4  # many ties
    weight = Sparse.of(W, keep_share(W.abs(), sparsity, per))
    rows = [W.flatten().tolist()] if per == "layer" else W.tolist()
    for row, ours in zip(rows, weight.dense().view(len(rows), -1).tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda i: (abs(row[i]), i))
        gone = set(order[: round(sparsity * len(row))])
        assert ours == [0 if i in gone else w for i, w in enumerate(row)]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)])
def test_keep_n_of_m_against_loops(n: int, m: int) -> None:
    W = (normal(5, 24) * 40).round() / 4 + 0.01
    ours = Sparse.of(W, keep_n_of_m(W.abs(), n, m)).dense()
    for row, kept in zip(W.tolist(), ours.tolist(), strict=True):
        for start in range(0, 24, m):
            order = sorted(range(start, start + m), key=lambda i: (-abs(row[i]), i))[:n]
            assert [i for i in range(start, start + m) if kept[i] != 0] == sorted(order)
            assert all(kept[i] == row[i] for i in order)


def test_a_pattern_that_does_not_divide_the_width_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"2:4 needs an input width divisible by 4.* 5×10"):
        keep_n_of_m(normal(5, 10), 2, 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_takes_a_value_an_entry_kept_and_a_bit_an_entry(shape: tuple[int, int]) -> None:
    W = normal(*shape).to(torch.bfloat16)
    mask = normal(*shape, seed=1) > 0
    weight = Sparse.of(W, mask)
    assert weight.nbytes == 2 * int(mask.sum()) + shape[0] * -(-shape[1] // 8)
    assert weight.parameters == mask.sum()
    assert torch.equal(weight.dense(), W.float() * mask)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (7, 128), (40, 512)])
def test_nf4_decodes_as_bitsandbytes_does(shape: tuple[int, int], double: bool) -> None:
    W = normal(*shape, scale=0.02)
    W[:, 0] = 0
    packed, state = quantize_4bit(W, blocksize=64, compress_statistics=double, quant_type="nf4")
    theirs = dequantize_4bit(packed, state)
    ours = NF4.of(W, torch.float32, block=64, double_quant=double).dense()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (7, 30), (64, 96)])
def test_nf4_is_the_nearest_level_of_blocks_that_cross_rows(shape: tuple[int, int]) -> None:
    """bitsandbytes' own dequantize_4bit is wrong for these widths on CPUs with AVX-512."""
    W = normal(*shape, scale=0.02)
    weight = NF4.of(W, torch.float32, block=64, double_quant=False)
    levels = weight.tensors["quant_map"]
    for block, ours in zip(W.flatten().split(64), weight.dense().flatten().split(64), strict=True):
        points = levels * block.abs().max()
        best = (block[:, None] - points).abs().min(1).values
        torch.testing.assert_close((block - ours).abs(), best, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_decodes_as_bitsandbytes_does(dtype: torch.dtype) -> None:
    W = normal(12, 40).to(dtype)
    W[3] = 0
    weight = Int8.of(W.float(), dtype)
    theirs = int8_vectorwise_dequant(weight.tensors["codes"], weight.tensors["SCB"])
    torch.testing.assert_close(weight.dense(), theirs.float(), rtol=1e-3, atol=0)
    step = W.float().abs().amax(1, keepdim=True) / 127
    assert ((weight.dense() - W.float()).abs() <= 0.57 * step + 1e-9).all()


def test_low_rank_is_the_product_of_factors_of_any_kind() -> None:
    left, right = normal(10, 4), normal(4, 16, seed=1)
    plain = LowRank.of(left, right, torch.float32)
    torch.testing.assert_close(plain.dense(), left @ right)
    assert (plain.rank, plain.parameters, plain.nbytes) == (4, 104, 416)
    codes = torch.randint(0, 16, (4, 16), generator=torch.Generator().manual_seed(0))
    thin = Quantized.pack(
        codes, torch.ones(4, 1).half(), None, bits=4, group=16, dtype=torch.float16
    )
    mixed = LowRank.join(Sparse.of(left, left > 0), thin, torch.float32)
    torch.testing.assert_close(mixed.dense(), left.clamp(min=0) @ (codes - 8).float())
    assert mixed.left.kind == "sparse"
    assert mixed.right.nbytes == thin.nbytes
    assert mixed.nbytes == mixed.left.nbytes + mixed.right.nbytes


def test_a_sum_adds_its_terms_and_nests() -> None:
    a, b, c = normal(6, 8), normal(6, 2, seed=1), normal(2, 8, seed=2)
    terms = [Dense.of(a), LowRank.of(b, c, torch.float32), *[Dense.of(a)] * 10]
    weight = Sum.of(*terms)
    torch.testing.assert_close(weight.dense(), 11 * a + b @ c)
    assert [term.kind for term in weight.terms] == ["dense", "lowrank"] + ["dense"] * 10
    assert torch.equal(weight.terms[1].dense(), terms[1].dense())
    assert weight.nbytes == sum(term.nbytes for term in terms)


@pytest.mark.parametrize("kind", sorted(Weight.kinds))
def test_every_kind_comes_back_from_its_spec_and_tensors(kind: str) -> None:
    weight = starting_weight(kind)
    again = Weight.restore(json.loads(json.dumps(weight.spec)), weight.tensors)
    assert type(again) is type(weight)
    assert weight.kind == kind
    assert torch.equal(again.dense(), weight.dense())
    assert weight.shape == (96, 128) == tuple(weight.dense().shape)
    assert weight.dtype == torch.bfloat16
