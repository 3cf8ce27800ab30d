"""Sparsity shared out between matrices."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import normal
from torch import Tensor

from compress import load
from compress import recipe as recipes
from compress import run as runs
from compress.compressors.pruning.admm import ADMM
from compress.compressors.pruning.allocation import OUTLIER, REACH, by_error, by_outliers
from compress.compressors.pruning.wanda import Wanda
from compress.problem import LayerProblem

SIZES = {"wide": (8, 20), "tall": (30, 5), "square": (10, 10)}


def problems() -> list[LayerProblem]:
    made = []
    for seed, (name, shape) in enumerate(SIZES.items()):
        h = normal(shape[1], seed=10 + seed, scale=1).square() * 10**seed
        made.append(LayerProblem.of(normal(*shape, seed=seed), torch.diag(h), name))
    return made


def lost(problem: LayerProblem, share: float) -> float:
    """Σ w²·h of the smallest, over the root of that of all."""
    score: Tensor = (problem.W.square() * problem.H_diag).flatten().sort().values
    return float(score[: round(share * len(score))].sum() / score.sum().sqrt())


def test_no_other_shares_lose_less() -> None:
    made = problems()
    shares = by_error(made, 0.6)
    kept = sum(p.W.numel() - round(shares[p.name] * p.W.numel()) for p in made)
    whole = sum(p.W.numel() for p in made)
    assert 0.4 * whole - 5 <= kept <= 0.4 * whole
    ours = sum(lost(p, shares[p.name]) for p in made)
    best = min(
        sum(lost(p, s) for p, s in zip(made, some, strict=True))
        for some in itertools.product([i / 20 for i in range(20)], repeat=3)
        if sum(p.W.numel() * (1 - s) for p, s in zip(made, some, strict=True)) <= kept
    )
    assert ours <= best * 1.02
    assert max(shares.values()) - min(shares.values()) > 0.2


def test_outliers_by_their_formula() -> None:
    made = problems()
    made[1].W[:, 0] *= 1000
    made = [LayerProblem.of(p.W * 1.0, p.H, p.name) for p in made]
    spread = LayerProblem.of(torch.nn.functional.pad(made[2].W, (0, 10), value=1e-4), None, "out")
    made.append(spread)
    shares = by_outliers(made, 0.5)
    ratios = {}
    for p in made:
        score = p.W.abs() * p.H_diag.sqrt()
        ratios[p.name] = float((score > OUTLIER * score.mean()).float().mean())
    order = sorted(ratios, key=lambda name: ratios[name])
    assert [shares[n] for n in order] == sorted(shares.values(), reverse=True)
    assert max(shares.values()) - min(shares.values()) == pytest.approx(2 * REACH)
    whole = sum(p.W.numel() for p in made)
    assert sum(p.W.numel() * shares[p.name] for p in made) / whole == pytest.approx(0.5)


def test_alike_matrices_get_alike_shares() -> None:
    twins = [LayerProblem.of(normal(6, 50), None, name) for name in ("one", "other")]
    for share_out in (by_error, by_outliers):
        assert share_out(twins, 0.4) == pytest.approx({"one": 0.4, "other": 0.4}, abs=0.011)


@pytest.mark.parametrize("method", ["wanda", "admm"])
def test_the_whole_has_the_sparsity_that_was_asked(method: str, text: str, tmp_path: Path) -> None:
    stage: dict[str, Any] = {"use": method, "sparsity": 0.6, "allocation": "error"}
    made = {"model": "demo", "stages": [stage], "calibration": {"data": text, "samples": 8}}
    info = runs.apply(recipes.load_one(made), tmp_path / "out", verify=False)
    model = load(tmp_path / "out")
    zeros = [
        float((model.get_submodule(site["name"]).weight == 0).float().mean())
        for site in info["sites"]
    ]
    sizes = [site["shape"][0] * site["shape"][1] for site in info["sites"]]
    whole = sum(z * s for z, s in zip(zeros, sizes, strict=True)) / sum(sizes)
    assert whole == pytest.approx(0.6, abs=0.005)
    assert max(zeros) - min(zeros) > 0.1


def test_patterns_are_the_same_everywhere() -> None:
    with pytest.raises(ValueError, match="drop 'allocation'"):
        Wanda(pattern="2:4", allocation="error")
    assert ADMM(pattern="2:4").allocation == "uniform"
    assert ADMM.model_validate(ADMM(pattern="2:4").model_dump()) == ADMM(pattern="2:4")
    assert ADMM(sparsity=0.5).allocation == "error"
