"""What measured plans say of the costs that they were made by."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from tiny import save

from compress import recipe as recipes
from compress.errors import RecipeError
from compress.events import outcome
from compress.planning.plan import Plan
from compress.planning.planner import Planner
from compress.planning.worth import DOUBT, Worth, kinds
from compress.sizes import parse_effort
from compress.source import Source


def test_sites_are_alike_by_role_and_half() -> None:
    sites = [s for s in Source("demo").anatomy.sites if s.role in ("embed", "q_proj", "up_proj")]
    assert [s.block for s in sites] == [None, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert kinds(sites) == [0, *[1, 2] * 3, *[3, 4] * 3]


def test_worths_are_found_from_sums() -> None:
    """As ratios: all of them together are the regression's level."""
    draw = torch.Generator().manual_seed(0)
    worth = torch.tensor([0.5, 1.0, 2.0, 1.0]).double()
    costs = torch.rand(30, 4, generator=draw).double() + 0.1
    for exponent in (0.8, 1.0):
        found = Worth.of(costs, 3 * (costs @ worth) ** exponent).mean.exp()
        assert (found / found[1] / (worth / worth[1])).log().abs().max() < 0.1


def test_what_one_plan_leaves_open() -> None:
    """No kind is known better than before, and draws say so."""
    known = Worth.of(torch.ones(1, 5).double(), torch.ones(1).double())
    assert known.mean.abs().max() < 1e-6
    draw = torch.Generator().manual_seed(1)
    drawn = torch.stack([known.drawn(draw).log() for _ in range(400)])
    assert drawn.std(0) == pytest.approx(torch.full((5,), DOUBT), rel=0.15)


class Skewed(Planner):
    """What attention reads costs five times what trials say, and nothing is applied."""

    @property
    def worth(self) -> list[float]:
        return [
            5.0 if self.sites[c.names[0]].role in ("q_proj", "k_proj") else 1.0
            for c in self.choices
        ]

    def measure(self, made: Plan) -> tuple[float, float]:
        costs = [float(c.costs[i]) for c, i in self._index(made.settings)]
        return sum(w * cost for w, cost in zip(self.worth, costs, strict=True)), 0.0


def skewed(text: str, folder: Path) -> Skewed:
    """Such a planner, which has looked at a tiny model."""
    model = save(folder / "model", "LlamaForCausalLM", tiny.LLAMA)
    recipe = recipes.load_one({
        "model": model,
        "calibration": {"data": text, "samples": 8, "length": 64},
        "stages": [{"use": "ecgptq", "targets": ["blocks"]}],
    })  # fmt: skip
    planner = Skewed(recipe, Source(model), recipe.stages[0])
    outcome(planner.look())
    planner.__dict__["held"] = True
    return planner


def test_what_costs_more_than_trials_say_is_spared(text: str, tmp_path: Path) -> None:
    """A third of what is to be gained; draws alone find a fifth. Every matrix is its own kind."""
    planner = skewed(text, tmp_path)
    first = planner.fit((3 * planner.least + 4 * planner.most) // 7)
    told = [
        replace(c, costs=c.costs * w) for c, w in zip(planner.choices, planner.worth, strict=True)
    ]
    before, best = (planner.measure(plan)[0] for plan in (first, planner.fit(first.budget, told)))
    found = outcome(planner.refine(first, 12))
    assert best < 0.92 * before
    assert found.measured == planner.measure(found)
    assert found.bytes <= first.budget
    assert found.expected < 0.7 * before + 0.3 * best


def test_no_more_is_tried_when_time_is_over(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = skewed(text, tmp_path)
    first = planner.fit((3 * planner.least + 4 * planner.most) // 7)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("compress.planning.planner.time.monotonic", lambda: next(clock))
    assert len(list(planner.refine(first, 12, 35))) == 3
    assert len(list(planner.refine(first, 2, 1000))) == 2
    none = planner.refine(first, 12, 0)
    assert not list(none)
    assert outcome(planner.refine(first, 12, 0)).settings == first.settings


@pytest.mark.parametrize(
    ("written", "meant"),
    [("6", (6, math.inf)), ("0", (0, math.inf)), ("90s", (1000, 90)), ("1.5 h", (1000, 5400)),
     ("10MIN", (1000, 600))],
)  # fmt: skip
def test_efforts_are_plans_or_a_time(written: str, meant: tuple[int, float]) -> None:
    assert parse_effort(written) == meant


@pytest.mark.parametrize("written", ["1.5", "soon", "-3", "10m", ""])
def test_other_efforts_are_refused(written: str) -> None:
    with pytest.raises(RecipeError, match="a number of plans, or a time"):
        parse_effort(written)
