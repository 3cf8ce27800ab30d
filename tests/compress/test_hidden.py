"""Narrower residual streams: which directions stay, what is solved, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress import recipe as recipes
from compress import run as runs
from compress.compressors.structure.hidden import Hidden, Slice, directions
from compress.errors import CompressError
from compress.moments import Moments
from compress.plain_load import observe
from compress.preflight import preflight
from compress.problem import LayerProblem
from compress.source import Source
from compress.verify import probe_inputs, relative_difference

sys.path.append(str(Path(__file__).parents[1] / "end_to_end"))
import models

HIDDEN = {"use": "hidden", "amount": 0.5}


def moments(width: int, seed: int, tokens: int = 50) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=random, dtype=torch.float64)
    x = x @ torch.randn(width, width, generator=random, dtype=torch.float64)
    return x.T @ x / tokens


def lost(C: Tensor, G: Tensor, V: Tensor) -> float:
    """The mean square of gᵀ(x − the least-squares guess of x from Vᵀx)."""
    B = C @ V
    return float((G * (C - B @ torch.linalg.solve(V.T @ B, B.T))).sum())


@pytest.mark.parametrize("keep", [1, 3, 6])
def test_of_a_white_stream_the_best_of_all_directions_are_kept(keep: int) -> None:
    C, G = torch.eye(8, dtype=torch.float64) * 3, moments(8, 1)
    V = directions(C, G)[:, :keep]
    best = lost(C, G, V)
    assert best == pytest.approx(3 * float(torch.linalg.eigvalsh(G)[: 8 - keep].sum()))
    for seed in range(100):
        other = torch.randn(8, keep, generator=torch.Generator().manual_seed(seed)).double()
        assert best < lost(C, G, other)
        assert best <= lost(C, G, V + 0.02 * other) + 1e-9


def test_what_varies_counts_as_much_as_what_is_felt() -> None:
    C = torch.tensor([1.0, 4, 9, 16]).diag()
    G = torch.tensor([100.0, 1, 5, 1]).diag()
    assert directions(C, G).abs().argmax(0).tolist() == [0, 2, 3, 1]
    assert directions(C).abs().argmax(0).tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("keep", [2, 4, 6])
def test_less_is_lost_than_with_pca(keep: int) -> None:
    ours = plain = 0.0
    for seed in range(20):
        C, G = moments(8, seed), moments(8, 100 + seed)
        ours += lost(C, G, directions(C, G)[:, :keep])
        plain += lost(C, G, directions(C)[:, :keep])
    assert ours < 0.9 * plain


def test_without_gradients_it_is_pca() -> None:
    C = moments(8, 2)
    values, vectors = torch.linalg.eigh(C)
    V = directions(C)[:, :3]
    torch.testing.assert_close(V @ V.T, vectors[:, -3:] @ vectors[:, -3:].T)
    assert torch.equal(directions(C), directions(C, torch.zeros_like(C)))
    assert float((V.T @ C @ V).trace()) == pytest.approx(float(values[-3:].sum()))
    W = directions(C, torch.eye(8))[:, :3]
    torch.testing.assert_close(W @ W.T, V @ V.T)


@pytest.mark.parametrize("dead", [0, 3, 7])
def test_directions_are_orthogonal_even_where_nothing_is_seen(dead: int) -> None:
    C, G = moments(8, 3), moments(8, 4)
    C[:dead], C[:, :dead] = 0, 0
    G[5:], G[:, 5:] = 0, 0
    for R in (directions(C), directions(C, G)):
        torch.testing.assert_close(R.T @ R, torch.eye(8, dtype=torch.float64))


def test_what_reads_the_rest_is_the_least_squares_answer() -> None:
    """From 5 of 8 channels, themselves a little wrong, to what the matrix made of all 8."""
    random = torch.Generator().manual_seed(5)
    X = torch.randn(400, 8, generator=random) @ torch.randn(8, 8, generator=random)
    Y = X + 0.1 * torch.randn(400, 8, generator=random)
    Y[:, 5:] = 0
    W = torch.randn(4, 8, generator=random)
    seen = Moments(Y.T @ Y / 400, Y.T @ X / 400)
    problem = LayerProblem("reader", compress.weights.Dense.of(W), seen, seen.corrected(W, 1.0))
    solver = Slice(keep=5, readers=frozenset({"reader"}), propagate=1)
    solved = solver.solve(problem).dense()
    wanted = torch.linalg.lstsq(Y[:, :5].double(), (X @ W.T).double()).solution.T
    assert not solved[:, 5:].any()
    far = (Y[:, :5] @ (solved[:, :5] - wanted.float()).T).norm() / (X @ W.T).norm()
    assert far < 0.02, "off by more than the damping explains"
    other = Slice(keep=3, readers=frozenset()).solve(problem).dense()
    assert not other[3:].any()
    torch.testing.assert_close(other[:3], problem.target[:3])


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(model, stages)`` → the checkpoint folder."""
    text = tmp_path / "text.txt"
    text.write_text(models.TEXT)

    def made(model: Path, *stages: dict[str, Any], untie: bool = True, name: str = "out") -> Path:
        recipe = {"model": str(model), "stages": list(stages), "untie": untie}
        recipe["calibration"] = {"data": str(text), "samples": 16}
        out = tmp_path / name
        runs.apply(recipes.load_one(recipe), out)
        return out

    return made


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}), ("mistral", {}), ("qwen2", {}), ("qwen3", {}),
        ("llama", {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5}),
    ],
)  # fmt: skip
def test_folders_are_ordinary_models(
    family: str, changes: dict[str, int], make: Make, tmp_path: Path
) -> None:
    model = models.save(tmp_path / "model", family, **changes)
    folder = make(model, HIDDEN)
    made = json.loads((folder / "config.json").read_text())
    assert made["hidden_size"] == 32
    assert made["head_dim"] == (16 if changes else 32)
    if changes:  # 5 heads do not divide 32
        assert made["model_type"] == "mistral"
    record = models.record(folder)
    assert record["storage"] == "dense"
    assert models.loaded_difference(folder) < 1e-4
    recipe = recipes.load_one({"model": str(model), "stages": [HIDDEN], "untie": True})
    assert record["bytes"]["ideal"] == preflight(recipe, Source(model, untie=True)).model_after
    stage = record["stages"][0]
    assert stage["hidden_size"] == 32
    assert 0.5 < stage["variance"] < 1
    for site in record["sites"]:
        wide = site["role"] in ("o_proj", "down_proj")
        assert site["shape"][0 if wide else 1] == 32
    out = compress.load(folder).generate(torch.arange(5)[None], max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 10)


def narrow_inside(model: Path) -> Path:
    """A model whose stream, 64 channels wide, only ever uses 32 directions."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    V = torch.linalg.qr(torch.randn(64, 32, generator=torch.Generator().manual_seed(9))).Q
    for name, tensor in tensors.items():
        if "embed_tokens" in name:
            tensors[name] = tensor @ V @ V.T
        elif "o_proj" in name or "down_proj" in name:
            tensors[name] = V @ V.T @ tensor
        elif "norm" in name:
            tensors[name] = tensor + 0.3 * torch.sin(torch.arange(len(tensor)))
    save_file(tensors, path, {"format": "pt"})
    return model


@pytest.mark.parametrize("loss_weighted", [True, False])
def test_nothing_is_lost_with_directions_that_are_never_used(
    loss_weighted: bool, make: Make, tmp_path: Path
) -> None:
    model = narrow_inside(models.save(tmp_path / "model", "llama", tie_word_embeddings=False))
    whole = compress.load(model)
    inputs = probe_inputs(whole)
    wanted = observe(whole, inputs)
    folder = make(model, {**HIDDEN, "loss_weighted": loss_weighted}, untie=False)
    assert relative_difference(wanted, observe(compress.load(folder), inputs)) < 1e-3
    assert models.record(folder)["stages"][0]["variance"] == pytest.approx(1)
    half = make(model, {**HIDDEN, "amount": 0.75, "multiple": 1}, untie=False, name="half")
    assert relative_difference(wanted, observe(compress.load(half), inputs)) > 0.1


def test_chains(make: Make, tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", "llama", num_hidden_layers=3)
    folder = make(
        model,
        {"use": "depth", "amount": 0.3},
        {**HIDDEN, "propagate": 0.5},
        {"use": "width", "targets": ["mlp"]},
        {"use": "distill", "steps": 3, "samples": 8, "length": 16, "batch": 4},
        {"use": "gptq", "group": 32, "targets": ["all"]},
    )
    assert models.loaded_difference(folder) < 5e-3
    made = json.loads((folder / "config.json").read_text())
    shape = [made[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size")]
    assert shape == [2, 32, 96]


def test_a_killed_run_goes_on_in_the_same_directions(make: Make, tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", "llama")
    whole = make(model, HIDDEN, {"use": "rtn", "bits": 8, "group": 32}, name="whole")
    recipe = recipes.load_one(models.record(whole)["recipe"])
    out = tmp_path / "again" / "whole"
    models.killed(recipe, out, ("hidden", 1), ("hidden", 12), ("rtn", 1))
    runs.apply(recipe, out)
    assert models.digests(out) == models.digests(whole)


@pytest.mark.parametrize(
    ("family", "stage", "untie", "message"),
    [
        ("llama", HIDDEN, False, "set untie: true"),
        ("llama", {**HIDDEN, "targets": ["blocks"]}, True, "lm_head is not among its targets"),
        ("llama", {**HIDDEN, "amount": 0.001, "multiple": 1}, True, "nothing goes"),
        ("gpt2", HIDDEN, True, "LayerNorm"),
        ("opt", HIDDEN, True, "models with RMSNorm"),
        ("bert", HIDDEN, True, "turning its residual stream changes"),
    ],
)
def test_refusals(
    family: str, stage: dict[str, Any], untie: bool, message: str, make: Make, tmp_path: Path
) -> None:
    model = models.save(tmp_path / "model", family, tie_word_embeddings=True)
    with pytest.raises(CompressError, match=message):
        make(model, stage, untie=untie)
    assert not (tmp_path / "out").exists()


def test_biases_of_what_writes_are_refused(make: Make, tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", "llama", attention_bias=True)
    with pytest.raises(CompressError, match=r"o_proj has a bias"):
        make(model, HIDDEN)


def test_how_much_stays() -> None:
    assert [Hidden(amount=0.25).keeps(n, 32) for n in (64, 128, 4096)] == [32, 96, 3072]
