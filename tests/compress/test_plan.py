"""A size in, bits for every matrix out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compress.plan import Plan, plan
from tiny import normal
from torch import Tensor

from compress import recipe as recipes
from compress import run as runs
from compress.arguments import parse_size
from compress.compressors.quantization.bits import cost
from compress.compressors.quantization.rtn import RTN
from compress.errors import DataError, RecipeError
from compress.problem import LayerProblem, Table
from compress.source import Source


def planned(budget: int, text: str, **stage: Any) -> Plan:
    made = recipes.load_one({
        "model": "demo",
        "calibration": {"data": text, "samples": 8, "length": 64},
        "stages": [{"use": "gptq", "targets": ["all"], **stage}],
    })  # fmt: skip
    events = plan(made, Source("demo"), made.stages[0], budget)
    while True:
        try:
            next(events)
        except StopIteration as stop:
            return stop.value


def test_sizes_as_people_write_them() -> None:
    assert parse_size("30%", 1000) == 300
    assert parse_size("1.5 kB", 10**6) == 1500
    assert parse_size("2MB", 10**9) == 2_000_000
    assert parse_size("723228", 10**9) == 723228
    for wrong in ("30 percent", "-5%", "0%", "MB"):
        with pytest.raises(RecipeError, match="size"):
            parse_size(wrong, 1000)


@pytest.mark.parametrize(
    ("share", "stage"),
    [(0.25, {}), (0.45, {"targets": ["blocks"]}), (0.3, {"symmetric": False, "group": 32})],
)
def test_the_file_has_the_predicted_bytes_and_is_just_within_the_size(
    share: float, stage: dict[str, Any], text: str, tmp_path: Path
) -> None:
    budget = int(share * Source("demo").nbytes)
    found = planned(budget, text, **stage)
    info = runs.apply(found.recipe, tmp_path / "out", verify=share == 0.25)
    disk = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert disk == info["bytes"]["disk"] == found.bytes
    assert 0.99 * budget < disk <= budget
    again = recipes.load_one(found.recipe.dump())
    assert again.dump() == found.recipe.dump()
    bits = {s.name: again.stages[0].compressor_for(s).bits for s in Source("demo").anatomy.sites}  # type: ignore[attr-defined]
    assert {name: bits[name] for name in found.bits} == found.bits
    assert len(set(found.bits.values())) > 2


def test_too_small_a_size_says_what_the_least_is(text: str) -> None:
    with pytest.raises(RecipeError, match=r"too few.*matrices in 2 bits come to \d"):
        planned(100_000, text)
    made = recipes.load_one({"model": "demo", "stages": [{"use": "gptq"}]})
    silent = made.calibration.model_copy(update={"data": ""})
    made = made.model_copy(update={"calibration": silent})
    with pytest.raises(DataError, match="needs text"):
        next(plan(made, Source("demo"), made.stages[0], 2_000_000))


def test_what_a_table_costs_by_its_definition() -> None:
    """Rows that are looked up and make logits: ½ E[(g · D_token)²] + ½ Σ_v E[l_v²] D_v H D_vᵀ."""
    rows, width = 12, 6
    ids = torch.arange(40) ** 2 % rows
    g, h, logits = (normal(40, n, seed=s, scale=1) for s, n in enumerate((width, width, rows)))
    W = normal(rows, width, seed=9)
    table = Table(torch.bincount(ids, minlength=rows) / 40.0, g.T @ g / 40, logits.square().mean(0))
    plain = LayerProblem.of(W, h.T @ h / 40)
    problem = LayerProblem("table", plain.weight, plain.moments, table=table)
    weight = RTN(bits=3, group=8).solve(problem)
    D: Tensor = weight.dense() - W
    looked = sum(float(D[i] @ (g.T @ g / 40) @ D[i]) for i in ids) / 40
    made = sum(
        float(logits[:, v].square().mean() * (D[v] @ h.T).square().mean()) for v in range(rows)
    )
    assert cost(problem, weight) == pytest.approx(0.5 * (looked + made), rel=1e-3)
