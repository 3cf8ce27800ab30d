"""Integers of ours in the layouts of other programs, against loops over their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.export.gguf_blocks import carried
from compress.weights import Huffman, Int8, Quantized, Weight
from compress.weights.layouts import AWQ_ORDER, from_awq, from_gptq, to_gptq, widened
from compress.weights.modeling_compressed import unpack_codes


def grid(bits: int, group: int, even: bool, rows: int = 64, columns: int = 96) -> Quantized:
    """A weight whose codes, scales and zero-points have nothing in common."""
    draw = torch.Generator().manual_seed(bits)
    top = 2**bits
    codes = torch.randint(0, top, (rows, columns), generator=draw).to(torch.uint8)
    groups = -(-columns // group)
    scale = torch.rand(rows, groups, generator=draw).add(0.1).to(torch.bfloat16)
    zero = None if even else torch.randint(0, top, (rows, groups), generator=draw)
    return Quantized.pack(codes, scale, zero, bits=bits, group=group, dtype=torch.bfloat16)


def gptq_values(tensors: dict[str, Tensor], bits: int, one: int) -> Tensor:
    """float32 [out, in] by the definition: bit after bit, w = (q − (z + one)) · s."""

    def field(words: list[int], number: int) -> int:
        whole = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
        return whole >> (bits * number) & (2**bits - 1)

    columns, rows = tensors["qweight"].shape[0] * 32 // bits, tensors["qweight"].shape[1]
    values = torch.empty(rows, columns)
    for i in range(rows):
        down = tensors["qweight"][:, i].tolist()
        for j in range(columns):
            g = int(tensors["g_idx"][j])
            zero = field(tensors["qzeros"][g].tolist(), i) + one
            values[i, j] = (field(down, j) - zero) * float(tensors["scales"][g, i])
    return values


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("even", [True, False])
def test_gptq_by_its_definition_and_back(bits: int, even: bool) -> None:
    weight = grid(bits, 32, even, rows=32)
    tensors = to_gptq(weight)
    assert torch.equal(gptq_values(tensors, bits, one=int(even)), weight.dense())
    back = from_gptq(tensors, bits, 32, 1 if even else 2, torch.bfloat16)
    assert isinstance(back, Quantized)
    assert torch.equal(back.tensors["weight_packed"], weight.tensors["weight_packed"])
    assert torch.equal(back.dense(), weight.dense())


def test_gptq_with_inputs_in_another_order_is_dense() -> None:
    weight = grid(4, 32, True, rows=32)
    tensors = to_gptq(weight)
    mixed = tensors["g_idx"][torch.randperm(96, generator=torch.Generator().manual_seed(1))]
    there = from_gptq(tensors | {"g_idx": mixed}, 4, 32, 1, torch.float32)
    assert there.kind == "dense"
    expected = gptq_values(tensors | {"g_idx": mixed}, 4, one=1)
    torch.testing.assert_close(there.dense(), expected)


@pytest.mark.parametrize("bits", [5, 6, 7])
@pytest.mark.parametrize("even", [True, False])
def test_wider_codes_are_the_same_numbers(bits: int, even: bool) -> None:
    weight = grid(bits, 96, even)
    assert widened(weight).spec["bits"] == 8
    assert torch.equal(widened(weight).dense(), weight.dense())


def test_awq_by_its_definition() -> None:
    weight = grid(4, 32, False)
    codes = unpack_codes(weight.spec, weight.tensors).int() + 8
    zero = torch.randint(0, 16, (64, 3), generator=torch.Generator().manual_seed(3))

    def packed(numbers: Tensor) -> Tensor:
        words = torch.zeros(numbers.shape[0], numbers.shape[1] // 8, dtype=torch.int64)
        for word in range(words.shape[1]):
            for place, output in enumerate(AWQ_ORDER):
                words[:, word] |= numbers[:, 8 * word + output].long() << (4 * place)
        return words.where(words < 2**31, words - 2**32).to(torch.int32)

    scales = weight.tensors["weight_scale"].T.contiguous()
    tensors = {"qweight": packed(codes.T), "qzeros": packed(zero.T), "scales": scales}
    expected = (codes - zero.repeat_interleave(32, 1)) * scales.T.float().repeat_interleave(32, 1)
    torch.testing.assert_close(from_awq(tensors, 32, torch.float32).dense(), expected)


@pytest.mark.parametrize(
    ("bits", "even", "kind"),
    [
        (2, True, "Q4_0"), (3, True, "Q4_0"), (4, True, "Q4_0"), (5, True, "Q5_0"),
        (6, True, "Q8_0"), (8, True, "Q8_0"), (4, False, "Q4_1"), (5, False, "Q5_1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("group", [32, 96])
def test_gguf_blocks_hold_our_numbers(bits: int, even: bool, kind: str, group: int) -> None:
    gguf = pytest.importorskip("gguf")
    weight = grid(bits, group, even)
    found = carried(weight)
    assert found is not None
    assert found.type == kind
    values = gguf.quants.dequantize(found.data, gguf.GGMLQuantizationType[kind])
    if even:
        assert found.held == "exactly"
        assert torch.equal(torch.from_numpy(values), weight.dense())
    else:
        torch.testing.assert_close(torch.from_numpy(values), weight.dense(), rtol=1e-3, atol=8e-3)


def test_gguf_has_no_blocks_for_odd_widths_and_large_scales() -> None:
    assert carried(grid(4, 24, True, columns=48)) is None
    assert carried(grid(4, 16, True)) is None
    large = grid(4, 32, True)
    large.tensors["weight_scale"] *= 1e6
    assert carried(large) is None


def test_gguf_blocks_of_int8() -> None:
    gguf = pytest.importorskip("gguf")
    draw = torch.Generator().manual_seed(0)
    weight = Int8.of(torch.randn(32, 64, generator=draw), torch.bfloat16)
    found = carried(weight)
    assert found is not None
    values = gguf.quants.dequantize(found.data, gguf.GGMLQuantizationType.Q8_0)
    torch.testing.assert_close(torch.from_numpy(values), weight.dense(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("columns", [96, 97])
def test_a_huffman_code_and_back(bits: int, even: bool, columns: int) -> None:
    weight = grid(bits, 32, even, rows=31, columns=columns)
    coded = Huffman.of(weight)
    assert torch.equal(Weight.restore(coded.spec, coded.tensors).dense(), weight.dense())
    back = coded.plain()
    assert back.spec == weight.spec
    assert back.tensors.keys() == weight.tensors.keys()
    assert all(torch.equal(back.tensors[name], weight.tensors[name]) for name in back.tensors)


def test_a_huffman_code_takes_what_frequencies_ask_for() -> None:
    draw = torch.Generator().manual_seed(0)
    codes = (torch.randn(256, 256, generator=draw) * 1.2 + 8).round().clamp(0, 15).to(torch.uint8)
    weight = Quantized.pack(codes, torch.ones(256, 1).half(), None, bits=4, group=256,
                            dtype=torch.float16)  # fmt: skip
    shares = torch.bincount(codes.flatten().int()) / codes.numel()
    entropy = -(shares[shares > 0] * shares[shares > 0].log2()).sum()
    found = 8 * len(Huffman.of(weight).tensors["stream"]) / codes.numel()
    assert entropy <= found < 1.03 * entropy
