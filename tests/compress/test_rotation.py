"""Rotations: what is turned, that the model stays the same, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress import recipe as recipes
from compress import run as runs
from compress.compressors.quantization.hadamard import Hadamard
from compress.errors import ModelError, RecipeError
from compress.heads import Head, find_heads
from compress.plain_load import observe
from compress.rotation import keeping_mean
from compress.source import Source
from compress.verify import probe_inputs, relative_difference
from compress.wiring import Probe, find_wires

sys.path.append(str(Path(__file__).parents[1] / "end_to_end"))
import models

HADAMARD: dict[str, Any] = {"use": "hadamard", "heads": True}


def turned(model: Path, *stages: dict[str, Any], untie: bool = True) -> Path:
    """The checkpoint folder of a model that is turned by hadamard, if no other stages are given."""
    out = model.with_name("out")
    made = {"model": str(model), "stages": list(stages) or [HADAMARD], "untie": untie}
    runs.apply(recipes.load_one(made), out, verify=False)
    return out


def uneven(model: Path) -> Path:
    """Give every norm gains and biases, and every bias something to be wrong about."""
    path = model / "model.safetensors"
    tensors, random = load_file(path), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            noise = torch.randn(tensor.shape, generator=random)
            tensors[name] = tensor + 0.3 * noise.clamp(-2, 2)
    save_file(tensors, path, {"format": "pt"})
    return model


def logits(folder: Path) -> list[float]:
    model = compress.load(folder)
    return observe(model, probe_inputs(model))


@pytest.mark.parametrize(("width", "size"), [(128, 1), (96, 3), (7, 7)])
def test_rotations_spread_every_channel(width: int, size: int) -> None:
    R = Hadamard(seed=3).rotation(width)
    torch.testing.assert_close(R.T @ R, torch.eye(width, dtype=torch.float64))
    block = width // size  # of equal size, up to the small orthogonal factor
    if size == 1:
        torch.testing.assert_close(R.abs(), torch.full_like(R, width**-0.5))
    share = R.square().view(block, size, block, size).sum(-1)
    torch.testing.assert_close(share, torch.full_like(share, 1 / block))
    assert not torch.equal(R, Hadamard(seed=4).rotation(width))


@pytest.mark.parametrize("width", [1, 2, 12, 64])
def test_keeping_the_mean(width: int) -> None:
    R = keeping_mean(Hadamard().rotation(width))
    x = torch.randn(5, width, dtype=torch.float64)
    torch.testing.assert_close(R.T @ R, torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close((x @ R).mean(1), x.mean(1))
    again = keeping_mean(torch.eye(width, dtype=torch.float64))
    assert torch.equal(again, torch.eye(width, dtype=torch.float64))
    if width == 64:
        assert R.abs().max() < 0.4, "a channel is still mostly one other"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"hidden_size": 48}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("gemma", {}),
        ("phi", {}),  # LayerNorm from here on: the mean stays
        ("neox", {"hidden_size": 48}),
        ("opt", {}),
        ("gpt2", {}),
    ],
)
def test_turned_models_stay_the_same(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = uneven(models.save(tmp_path / "model", family, **changes))
    out = turned(model)
    assert relative_difference(logits(out), logits(model)) < 1e-4
    old, new = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    norms = [name for name in new if "norm" in name or ".ln_" in name]
    gain = 0.0 if family == "gemma" else 1.0
    for name in norms:
        if name.endswith("weight"):
            assert torch.equal(new[name], torch.full_like(new[name], gain))
    sites = Source(str(model), untie=True).anatomy.sites
    for site in sites:
        before = old[site.parameter if site.parameter in old else sites[0].parameter]
        after = new[site.parameter]
        assert relative_difference(after.flatten().tolist(), before.flatten().tolist()) > 0.3


@pytest.mark.parametrize(
    ("family", "size", "changes"),
    [
        ("llama", 32, {}),
        ("gpt2", 32, {}),
        ("bert", 32, {}),
        ("t5", 32, {}),
        ("opt", 20, {"hidden_size": 60, "word_embed_proj_dim": 60, "num_attention_heads": 3}),
        ("mistral", 12, {"head_dim": 12, "num_attention_heads": 6, "num_key_value_heads": 3}),
        ("neox", 0, {}),  # its values lie between queries and keys: no wire
    ],
)
def test_heads_are_found_whole(
    family: str, size: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    source = Source(str(models.save(tmp_path / "model", family, **changes)))
    wires = find_wires(source)
    found = Probe(source).visit(lambda number, part, run: find_heads(wires[number], part, run))
    sizes = [{head.size for head in heads} for heads in found[1:]]
    assert sizes == [{size} if size else set()] * len(sizes)
    roles = {head.wire.readers[0].role for heads in found for head in heads}
    assert roles == ({"o_proj"} if size else set()), "what SwiGLU makes cannot be turned"


def test_a_head_is_turned_by_its_formula(tmp_path: Path) -> None:
    """Two query heads read one head of values: both blocks of o_proj's columns turn."""
    source = Source(str(uneven(models.save(tmp_path / "model", "qwen2"))))
    (wire,) = (w for w in find_wires(source)[1] if w.readers[0].role == "o_proj")
    part = Probe(source).part(1)
    v, o = "model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj"
    W, bias, O = part.weights[v].dense(), part.others[f"{v}.bias"], part.weights[o].dense()
    R = Hadamard().rotation(16)
    Head(wire, 16).turn(part, R)
    whole = torch.block_diag(R, R)
    torch.testing.assert_close(part.weights[v].dense().double(), whole.T @ W.double())
    torch.testing.assert_close(part.others[f"{v}.bias"].double(), bias.double() @ whole)
    twice = torch.block_diag(whole, whole)
    torch.testing.assert_close(part.weights[o].dense().double(), O.double() @ twice)


@pytest.mark.parametrize("family", ["bert", "t5", "whisper", "vit"])
def test_what_is_not_the_same_when_turned_is_refused(family: str, tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", family)
    with pytest.raises(ModelError, match=r"turning its residual stream|no token embedding"):
        turned(model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_bias_without_a_gain_is_refused(tmp_path: Path) -> None:
    model = uneven(models.save(tmp_path / "model", "opt"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.decoder.layers.0.self_attn_layer_norm.weight"][5] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="a channel with gain 0 and a bias"):
        turned(model)
    tensors["model.decoder.layers.0.self_attn_layer_norm.bias"][5] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert relative_difference(logits(turned(model)), logits(model)) < 1e-4


def test_turning_needs_the_whole_dense_model(tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", "llama")
    with pytest.raises(RecipeError, match="turns the whole model, and lm_head is not among"):
        turned(model, {"use": "hadamard", "targets": ["blocks", "embed"]})
    with pytest.raises(RecipeError, match="cannot follow"):
        turned(model, {"use": "rtn"}, {"use": "hadamard"})
    tied = models.save(tmp_path / "tied", "demo")
    with pytest.raises(ModelError, match=r"lm_head reads the table of .*untie: true"):
        turned(tied, untie=False)
