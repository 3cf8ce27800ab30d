"""Bits shared out between matrices."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BERT, normal, save
from torch import Tensor

from compress import compressor
from compress import recipe as recipes
from compress import run as runs
from compress.compressors.quantization.bits import WIDTHS, cost
from compress.compressors.quantization.gptq import GPTQ
from compress.compressors.quantization.rtn import RTN
from compress.errors import RecipeError
from compress.moments import Moments
from compress.problem import LayerProblem

SHAPES = {"wide": (8, 64), "tall": (48, 16), "square": (24, 24)}


def moment(size: int, seed: int) -> Tensor:
    x = normal(4 * size, size, seed=seed, scale=1) * (1 + 3 * torch.rand(size))
    return x.T @ x / len(x)


def problems() -> list[LayerProblem]:
    """Three, whose outputs matter to the loss in very different measure."""
    torch.manual_seed(0)
    made = []
    for seed, (name, (rows, columns)) in enumerate(SHAPES.items()):
        plain = LayerProblem.of(normal(rows, columns, seed=seed), moment(columns, seed), name)
        gradients = Moments(moment(rows, 10 + seed) * 100.0 ** (seed - 1))
        made.append(LayerProblem(name, plain.weight, plain.moments, None, gradients))
    return made


def by_hand(problem: LayerProblem, weight: Any) -> float:
    D = (weight.dense() - problem.W).double()
    F, H = problem.gradients.H.double(), problem.H.double()  # type: ignore[union-attr]
    return sum(
        0.5 * float(F[i, j] * (D[i] @ H @ D[j])) for i in range(len(F)) for j in range(len(F))
    )


def test_cost_by_its_definition() -> None:
    for problem in problems():
        weight = RTN(bits=3, group=16).solve(problem)
        assert cost(problem, weight) == pytest.approx(by_hand(problem, weight), rel=1e-3)


@pytest.mark.parametrize("method", [RTN, GPTQ])
def test_no_other_bits_cost_less(method: type[RTN] | type[GPTQ]) -> None:
    made = problems()
    asked = method(bits=3.4, group=16)
    solver = asked.prepare(lambda: iter(made))
    table = {
        (p.name, b): (asked.size(p.weight.shape, p.dtype, b), cost(p, asked.trial(p, b)))
        for p in made
        for b in WIDTHS
    }
    budget = sum(asked.predict(p.weight.shape, p.dtype) for p in made)
    chosen = {p.name: solver.at_site(p.name).bits for p in made}
    assert len(set(chosen.values())) > 1
    assert chosen["wide"] < chosen["square"]

    def total(bits: dict[str, Any], what: int) -> float:
        return sum(table[name, b][what] for name, b in bits.items())

    assert total(chosen, 0) <= budget
    every = (dict(zip(SHAPES, some, strict=True)) for some in itertools.product(WIDTHS, repeat=3))
    best = min(total(bits, 1) for bits in every if total(bits, 0) <= budget)
    assert total(chosen, 1) <= best * 1.2  # by prices, not by trying all


def test_size_between_two_bits_lies_between_them() -> None:
    shape, dtype = (30, 50), torch.bfloat16
    sizes = [RTN(bits=b).predict(shape, dtype) for b in (3, 3.25, 3.5, 4)]
    assert sizes == sorted(sizes)
    assert sizes[2] == pytest.approx((sizes[0] + sizes[3]) / 2, abs=1)
    assert RTN(bits=4.0).bits == 4
    assert isinstance(RTN(bits=4.0).bits, int)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_model_takes_the_bytes_of_the_average(method: str, text: str, tmp_path: Path) -> None:
    made = {
        "model": "demo",
        "stages": [{"use": method, "bits": 3.3}],
        "calibration": {"data": text, "samples": 8, "length": 64},
    }
    recipe = recipes.load_one(made)
    info = runs.apply(recipe, tmp_path / "out")
    taken = sum(site["bytes"] for site in info["sites"])
    stage = recipe.stages[0].compressor
    assert isinstance(stage, RTN | GPTQ)
    asked = sum(stage.size(tuple(s["shape"]), torch.bfloat16, 3.3) for s in info["sites"])
    assert 0.98 * asked <= taken <= asked
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    bits = {group["weights"]["num_bits"] for group in groups}
    assert len(bits) > 1
    assert bits <= set(WIDTHS)


def test_tables_are_planned_with_the_rest(text: str, tmp_path: Path) -> None:
    made = {
        "model": "demo",
        "stages": [{"use": "gptq", "bits": 3.3, "targets": ["all"]}],
        "calibration": {"data": text, "samples": 8, "length": 64},
    }
    info = runs.apply(recipes.load_one(made), tmp_path / "out", verify=False)
    names = {site["name"] for site in info["sites"]}
    assert "model.embed_tokens" in names
    stage = GPTQ(bits=3.3)
    asked = sum(stage.size(tuple(s["shape"]), torch.bfloat16, 3.3) for s in info["sites"])
    assert 0.98 * asked <= sum(site["bytes"] for site in info["sites"]) <= asked


def test_an_average_is_not_for_one_matrix() -> None:
    with pytest.raises(RecipeError, match="an average over the matrices"):
        compressor("rtn", bits=3.5)(normal(8, 64, seed=0))


@pytest.mark.parametrize("stage", [{"use": "gptq", "bits": 3.5, "group": 16}, {"use": "svd"}])
def test_models_without_a_loss_go_by_their_errors(
    stage: dict[str, Any], text: str, tmp_path: Path
) -> None:
    made = {
        "model": save(tmp_path / "model", "BertModel", BERT),
        "stages": [stage],
        "calibration": {"data": text, "samples": 8, "length": 32},
    }
    info = runs.apply(recipes.load_one(made), tmp_path / "out", verify=False)
    assert info["bytes"]["disk"] < info["bytes"]["original"]
    assert len({site["bytes"] / site["bytes_before"] for site in info["sites"]}) > 1
