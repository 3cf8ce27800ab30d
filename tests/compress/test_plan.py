"""A size in, settings for every matrix out."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import normal, save
from torch import Tensor

from compress import recipe as recipes
from compress import run as runs
from compress.anatomy import joined
from compress.compressors.budget import allocate, by_table, least_cost
from compress.compressors.quantization.bits import cost
from compress.compressors.quantization.rtn import RTN
from compress.errors import DataError, RecipeError
from compress.events import outcome
from compress.planning.goals import bytes_of, keep
from compress.planning.law import Law
from compress.planning.measure import held_out, measure
from compress.planning.menus import between, fast, menus_of, methods_of
from compress.planning.options import settings_of
from compress.planning.plan import Plan
from compress.planning.planner import Planner
from compress.planning.shapes import Shape
from compress.problem import LayerProblem, Table
from compress.recipe import Recipe
from compress.sizes import parse_share, parse_size
from compress.source import Source


def recipe_of(text: str, **stage: Any) -> Recipe:
    return recipes.load_one({
        "model": "demo",
        "calibration": {"data": text, "samples": 8, "length": 64},
        "stages": [{"use": "gptq", "targets": ["all"], **stage}],
    })  # fmt: skip


def planner_of(
    text: str, cache: Path | None = None, methods: str = "", model: str = "demo",
    plain: bool = False, speed: bool = False, **stage: Any,
) -> Planner:  # fmt: skip
    """One that has looked, but measured nothing."""
    recipe = recipe_of(text, **stage).model_copy(update={"model": model})
    made = Planner(
        recipe, Source(model), recipe.stages[0], methods=methods.split(), cache=cache,
        plain=plain, speed=speed,
    )  # fmt: skip
    for _ in made.look():
        pass
    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def planner(text: str, cache: Path) -> Planner:
    return planner_of(text, cache)


def test_sizes_as_people_write_them() -> None:
    assert parse_size("30%", 1000) == 300
    assert parse_size("1.5 kB", 10**6) == 1500
    assert parse_size("2MB", 10**9) == 2_000_000
    assert parse_size("723228", 10**9) == 723228
    for wrong in ("30 percent", "-5%", "0%", "MB"):
        with pytest.raises(RecipeError, match="size"):
            parse_size(wrong, 1000)
    assert parse_share("99%") == parse_share("0.99") == 0.99
    with pytest.raises(RecipeError, match="keep"):
        parse_share("100%")


@pytest.mark.parametrize(
    ("share", "stage"),
    [(0.3, {"symmetric": False, "group": 32})],
)
def test_the_file_has_the_predicted_bytes_and_is_just_within_the_size(
    share: float, stage: dict[str, Any], text: str, tmp_path: Path
) -> None:
    budget = int(share * Source("demo").nbytes)
    found = planner_of(text, **stage).fit(budget)
    info = runs.apply(found.recipe, tmp_path / "out", verify=False)
    disk = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert disk == info["bytes"]["disk"] == found.bytes
    assert 0.99 * budget < disk <= budget
    again = recipes.load_one(found.recipe.dump())
    assert again.dump() == found.recipe.dump()
    for site in Source("demo").anatomy.sites:
        if (option := found.settings.get(site.name)) and option.use:
            own: Any = again.stages[0].compressor_for(site)
            assert {"bits": own.bits, "group": own.group} == option.fields
    taken = [option.fields for option in found.settings.values() if option.use]
    assert len({fields["bits"] for fields in taken}) > 2
    assert len({fields["group"] for fields in taken}) > 1


@pytest.mark.parametrize(
    "methods",
    ["ecgptq", "gptq ecgptq svd", "svd", "admm", "svd admm", "gptq_residual", "gptq_sparse"],
)
@pytest.mark.parametrize("model", ["LLAMA", "GPT2"])
def test_every_family_keeps_to_the_size(
    methods: str, model: str, text: str, tmp_path: Path
) -> None:
    kind = {"LLAMA": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}[model]
    folder = save(tmp_path / "model", kind, getattr(tiny, model))
    planner = planner_of(text, methods=methods, model=folder, targets=["blocks"])
    budget = (planner.least + planner.source.nbytes) // 2
    found = planner.fit(budget)
    assert {option.use for option in found.settings.values()} <= {"", *methods.split()}
    loads = model == "LLAMA" and methods.startswith("gptq_")  # other kinds have tests of their own
    info = runs.apply(found.recipe, tmp_path / "out", verify=loads)
    disk = info["bytes"]["disk"]
    assert 0.99 * budget < found.bytes <= budget
    assert 0.99 * found.bytes < disk <= found.bytes
    if "ecgptq" not in methods:
        assert disk == found.bytes
    assert recipes.load_one(found.recipe.dump()).dump() == found.recipe.dump()


def test_families_by_name_and_what_they_leave(planner: Planner, text: str, cache: Path) -> None:
    assert methods_of(["low-rank", "pruning"]) == ["svd", "admm", "gptq_sparse"]
    with pytest.raises(RecipeError, match="choose among quantization"):
        methods_of(["lowrank"])
    with pytest.raises(RecipeError, match="rtn does not go by a size"):
        planner_of(text, cache, "rtn")
    with pytest.raises(RecipeError, match="compressed-tensors holds"):
        planner_of(text, cache, "svd", plain=True)
    quick = planner_of(text, cache, speed=True).fit(planner.source.nbytes // 3)
    assert all(map(fast, (o for o in quick.settings.values() if o.use)))
    assert not all(map(fast, planner.fit(planner.source.nbytes // 3).settings.values()))


def test_what_a_plan_may_cost_at_other_bits() -> None:
    """Between the tried ones, straight in the logarithm; no extrapolation below what fits."""
    assert between([(1, 1.0), (3, 0.01)], 2) == pytest.approx(0.1)
    assert between([(1, 1.0), (3, 0.01), (4, 0.001)], 3.5) == pytest.approx(10**-2.5)
    site = Source("demo").anatomy.sites[1]
    codes = menus_of(["ecgptq"])["ecgptq"]
    costs = {o.label: 4.0 ** -o.fields["bits"] for o in codes.knots(site)}
    costs[codes.knots(site)[0].label] = math.inf
    found = dict(codes.options(site, costs))
    assert min(o.fields["bits"] for o in found) == codes.knots(site)[1].fields["bits"]
    assert all(c == pytest.approx(4.0 ** -o.fields["bits"]) for o, c in found.items())


def test_no_choice_on_a_tiny_model_is_better(text: str, tmp_path: Path) -> None:
    """All choices of three options for five matrices, each applied and measured."""
    folder = save(tmp_path / "model", "LlamaForCausalLM", tiny.LLAMA)
    planner = planner_of(text, model=folder, targets=["v_proj", "o_proj", "up_proj"])
    planner.choices = [
        replace(c, options=c.options[:6:2], sizes=c.sizes[:6:2], costs=c.costs[:6:2])
        for c in planner.choices[:5]
    ]
    spans = [c.sizes for c in planner.choices]
    assert len(spans) == 5
    least = planner.least
    budget = least + sum(int(s[-1] - s[0]) for s in spans) // 2
    chosen = planner.measured(planner.fit(budget)).measured
    assert chosen
    measured = []
    for combination in itertools.product(range(3), repeat=len(spans)):
        settings = settings_of(zip(planner.choices, combination, strict=True))
        if planner.files.size(settings) <= budget:
            recipe = planner._recipe(settings)
            measured.append(planner.measure(Plan(recipe, settings, 0, 0, 0.0, 0.0, ""))[0])
    assert len(measured) > 60
    place = sum(kl < chosen[0] for kl in measured) / len(measured)
    assert place < 0.1, place
    assert chosen[0] < min(measured) + 2 * chosen[1]


def test_no_plan_is_above_its_size_or_far_below(planner: Planner) -> None:
    whole = planner.source.nbytes
    sizes = [planner.least + (whole - planner.least) * n // 23 for n in range(1, 20, 2)]
    plans = [planner.fit(size) for size in sizes]
    assert all(0.99 * size < made.bytes <= size for made, size in zip(plans, sizes, strict=True))
    costs = [made.cost for made in plans]
    assert costs == sorted(costs, reverse=True)
    assert sorted(made.gap for made in plans)[5] < 0.05


def test_the_next_plan_looks_at_nothing_again(
    planner: Planner, text: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.planning.planner.problems", None)
    size = int(0.25 * planner.source.nbytes)
    assert planner_of(text, cache).fit(size) == planner.fit(size)


def test_what_the_format_can_hold(planner: Planner, text: str, cache: Path) -> None:
    size = int(0.6 * planner.source.nbytes)
    plain = planner_of(text, cache, plain=True)
    made = plain.fit(size)
    assert made.format == "compressed-tensors"
    assert "model.embed_tokens" not in made.settings
    groups = joined(plain.sites.values())
    assert [len(group) for group in groups] == [3, 1, 2, 1] * 6
    assert all(len({made.settings[site.name] for site in group}) == 1 for group in groups)
    assert len(set(made.settings.values())) > 1
    assert set(made.settings) == set(plain.sites)
    assert planner.fit(size // 2).format == "modelling file"


def test_a_size_on_a_stage_is_obeyed(text: str, tmp_path: Path, planner: Planner, cache: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("compress.planning.goals.cache_folder", lambda: cache)
    recipe = recipe_of(text, budget={"size": "30%"})
    info = runs.apply(recipe, tmp_path / "out", verify=False)
    size = 0.3 * planner.source.nbytes
    assert 0.99 * size < info["bytes"]["disk"] <= size
    assert info["recipe"]["stages"][0]["overrides"]
    later = recipe.model_copy(update={"stages": [*recipe.stages, *recipe.stages]})
    with pytest.raises(RecipeError, match="first stage"):
        runs.apply(later, tmp_path / "other")
    with pytest.raises(RecipeError, match="size lots"):
        recipe_of(text, budget={"size": "lots"})


def test_too_small_a_size_says_what_the_least_is(planner: Planner, text: str) -> None:
    with pytest.raises(RecipeError, match=r"too few.*matrices by gptq come to \d"):
        planner.fit(100_000)
    with pytest.raises(RecipeError, match="too few"):  # before anything is measured
        list(planner.work(100_000))
    assert planner.law is None
    assert bytes_of("50%", planner.source) == planner.source.nbytes // 2
    for size in ("100%", "1GB"):
        with pytest.raises(RecipeError, match=r"2,892,912 bytes as it is; give fewer"):
            bytes_of(size, planner.source)
    recipe = recipe_of(text)
    silent = recipe.calibration.model_copy(update={"data": ""})
    recipe = recipe.model_copy(update={"calibration": silent})
    with pytest.raises(DataError, match="needs text"):
        Planner(recipe, Source("demo"), recipe.stages[0])


def test_the_bound_is_below_the_best_of_all_choices() -> None:
    """And the choice is close to the best, which trying all of them finds."""
    draw = torch.Generator().manual_seed(0)
    options = [
        (torch.randint(1, 100, (4,), generator=draw).sort().values + torch.arange(4),
         torch.rand(4, generator=draw).sort(descending=True).values * 10.0**n)
        for n in range(-2, 3)
    ]  # fmt: skip
    for budget in (150, 220, 300, 420):
        every = itertools.product(range(4), repeat=len(options))

        def total(chosen: Any, what: int) -> float:
            return sum(float(o[what][c]) for o, c in zip(options, chosen, strict=True))

        fits = [total(c, 1) for c in every if total(c, 0) <= budget]
        if fits:
            table = by_table(options, budget, buckets=budget)
            if table:
                assert total(table, 1) <= min(fits) * 1.05 + 1e-9
                assert total(table, 0) <= budget
            assert least_cost(options, budget) <= min(fits) + 1e-9
            assert total(allocate(options, budget), 1) >= min(fits) - 1e-9


def test_the_law_finds_a_line_and_covers_new_points() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.linspace(-4, 1, 7)
    missed = 0
    for _ in range(300):
        y = 0.9 * x - 0.5 + 0.1 * torch.randn(7, generator=draw)
        law = Law.of(x.exp().tolist(), y.exp().tolist())
        _, low, high = law.predict(1.0)
        new = float((-0.5 + 0.1 * torch.randn((), generator=draw)).exp())
        missed += not low <= new <= high
    assert 4 <= missed <= 30  # 15 expected
    exact = Law.of([0.1, 1.0, 10.0], [0.02, 0.2, 2.0])
    assert exact.predict(5.0)[0] == pytest.approx(1.0)
    bent = Law.of(x.exp().tolist(), (0.1 * x**2 + x).exp().tolist())
    assert bent.predict(0.3)[0] == pytest.approx(math.exp(0.1 * math.log(0.3) ** 2) * 0.3)


class Known(Planner):
    """One whose plans cost what they are predicted to, about, and nothing is applied."""

    error = 0.0  # share of a cost

    def measure(self, made: Plan) -> tuple[float, float]:
        return made.cost, self.error * made.cost


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_the_least_size_that_surely_keeps_the_quality(planner: Planner, error: float) -> None:
    known = object.__new__(Known)
    known.__dict__ |= planner.__dict__ | {
        "held": True,
        "law": Law.of([0.01, 0.1, 1], [0.02, 0.2, 2]),
        "error": error,
    }
    made, smaller = outcome(keep(known, 0.9))
    ends = [plan.measured[0] * (1 + 1.96 * error) for plan in (made, smaller)]
    assert ends[0] <= -math.log(0.9) < ends[1]
    assert made.budget - smaller.budget == pytest.approx(planner.source.nbytes / 100, abs=1)


def test_what_is_measured_is_what_apply_makes(text: str) -> None:
    """8 bits of everything change next to nothing; 2 bits a lot; text that is read is not used."""
    recipe = recipe_of(text, bits=8, targets=["down_proj"])
    whole = Shape.whole(Source("demo"))
    held = held_out(recipe, whole.source)
    assert held is not None
    good, _ = measure(recipe, whole, held)
    bad, _ = measure(recipe_of(text, bits=2, targets=["down_proj"]), whole, held)
    assert 0 < good < 0.001 < bad


def test_what_a_table_costs_by_its_definition() -> None:
    """Rows that are looked up and make logits: ½ E[(g · D_token)²] + ½ Σ_v E[l_v²] D_v H D_vᵀ.

    Each row counts a twentieth of the mean more than the text says, as others will hold it.
    """
    rows, width = 12, 6
    ids = torch.arange(40) ** 2 % rows
    g, h, logits = (normal(40, n, seed=s, scale=1) for s, n in enumerate((width, width, rows)))
    W = normal(rows, width, seed=9)
    table = Table(torch.bincount(ids, minlength=rows) / 40.0, g.T @ g / 40, logits.square().mean(0))
    plain = LayerProblem.of(W, h.T @ h / 40)
    problem = LayerProblem("table", plain.weight, plain.moments, table=table)
    weight = RTN(bits=3, group=8).solve(problem)
    D: Tensor = weight.dense() - W
    looks = [float(D[v] @ (g.T @ g / 40) @ D[v]) for v in range(rows)]
    looked = sum(looks[i] for i in ids) / 40 + 0.05 * sum(looks) / rows
    squares = logits.square()
    made = sum(
        float((squares[:, v].mean() + 0.05 * squares.mean()) * (D[v] @ h.T).square().mean())
        for v in range(rows)
    )
    assert cost(problem, weight) == pytest.approx(0.5 * (looked + made), rel=1e-3)
