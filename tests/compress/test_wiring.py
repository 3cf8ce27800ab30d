"""Wires: what is found in each family, and that scaling them leaves every model as it was."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from compress.source import Source
from compress.store import Part
from compress.weights import Dense
from compress.wiring import Probe, Wire, find_wires, fold, same

sys.path.append(str(Path(__file__).parents[1] / "end_to_end"))
import models

# role of the producer, or "norm" → roles that read it, for the first block (of the decoder)
LLAMA = {
    "norm": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "v_proj": [("o_proj",)],
    "up_proj": [("down_proj",)],
}
FOUND = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    # all of a parallel block read one norm, and GELU lets no scale through
    "phi": {"norm": [("q_proj", "k_proj", "v_proj", "up_proj")], "v_proj": [("o_proj",)]},
    "neox": {"norm": [("qkv_proj",), ("up_proj",)]},  # its values lie between queries and keys
    "opt": {
        "norm": [("q_proj", "k_proj", "v_proj"), ("up_proj",)],
        "v_proj": [("o_proj",)],
        "up_proj": [("down_proj",)],  # ReLU lets positive scales through
    },
    "gpt2": {"norm": [("qkv_proj",), ("up_proj",)], "qkv_proj": [("o_proj",)]},
    "bert": {"v_proj": [("o_proj",)]},  # what its norms put out goes on beside the matrices, too
    "vit": {"norm": [("q_proj", "k_proj", "v_proj"), ("up_proj",)], "v_proj": [("o_proj",)]},
}


def source(tmp_path: Path, family: str) -> Source:
    return Source(str(models.save(tmp_path / family, family)))


@pytest.mark.parametrize("family", FOUND)
def test_what_is_found(family: str, tmp_path: Path) -> None:
    found: dict[str, list[tuple[str, ...]]] = {}
    for wire in find_wires(source(tmp_path, family))[1]:
        maker = wire.site.role if wire.site else "norm"
        found.setdefault(maker, []).append(tuple(sorted(r.role for r in wire.readers)))
    assert {m: sorted(r) for m, r in found.items()} == {
        m: sorted(tuple(sorted(one)) for one in r) for m, r in FOUND[family].items()
    }


def test_grouped_heads_repeat_their_values(tmp_path: Path) -> None:
    """Two query heads of 32 read one head of values."""
    (wire,) = (w for w in find_wires(source(tmp_path, "llama"))[1] if w.readers[0].role == "o_proj")
    assert wire.source.tolist() == [*range(32), *range(32)]
    pooled = wire.pooled(torch.arange(64.0))
    assert pooled.tolist() == [16.0 + j for j in range(32)] * 2


def test_values_within_a_fused_projection(tmp_path: Path) -> None:
    """GPT-2 holds queries, keys and values in one matrix; values are its last third."""
    (wire,) = (w for w in find_wires(source(tmp_path, "gpt2"))[1] if w.readers[0].role == "o_proj")
    assert wire.source.tolist() == list(range(128, 192))


@pytest.mark.parametrize("family", ["llama", "gemma", "phi", "opt", "gpt2", "bert", "t5"])
def test_folded_weights_of_a_real_model_keep_its_logits(family: str, tmp_path: Path) -> None:
    """On the weights in the folder, not the probe's; scales far from 1."""
    opened = source(tmp_path, family)
    wires = find_wires(opened)
    probe = Probe(opened)
    probe.part = lambda number: Part(*opened.block(opened.anatomy.blocks[number]))  # type: ignore[method-assign]
    before = probe.output()
    after = probe.output(wires)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * before.abs().max().item())
    assert sum(map(len, wires)) >= 2


def test_a_scale_at_one_end_only_is_noticed(tmp_path: Path) -> None:
    """What the proof rests on: the probe's output depends on both ends of every wire."""
    opened = source(tmp_path, "llama")
    probe, wires = Probe(opened), find_wires(opened)
    before = probe.output()
    for wire in wires[1]:
        half = Wire((), wire.producer, wire.source, wire.site, wire.unit)
        assert not same(before, probe.output([(), (half,), ()]))


def test_a_tied_head_is_left_alone(tmp_path: Path) -> None:
    assert find_wires(Source("demo"))[0] == ()
    assert len(find_wires(source(tmp_path, "llama"))[0]) == 1


def test_a_norm_in_16_bits_loses_nothing() -> None:
    """Readers get the scale that the rounded norm stands for; a weight of zero has any."""
    norm = torch.tensor([1.0, 0.3, 0.0, -2.7]).bfloat16()
    part = Part({"a": Dense.of(torch.ones(2, 4))}, {"n.weight": norm, "n.bias": norm.clone()})
    site = Source("demo").anatomy.sites[1]
    reader = type(site)("a", "a", 0, (2, 4), "linear", torch.float32)
    fold(part, Wire((reader,), "n.weight", torch.arange(4)), torch.tensor([3.0, 0.7, 5.0, 1.1]))
    product = part.others["n.weight"].float() * part.weights["a"].dense()[0]
    torch.testing.assert_close(product, norm.float(), rtol=1e-6, atol=0)
    assert part.others["n.weight"].dtype == torch.bfloat16
