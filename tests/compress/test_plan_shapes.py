"""Plans that choose a shape first; corrections of rounded matrices, and zeros on a grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from tiny import normal, save

from compress import recipe as recipes
from compress import run as runs
from compress.checkpoint import load
from compress.compressors.lowrank.gptq_residual import GPTQResidual
from compress.compressors.lowrank.residual import Residual
from compress.compressors.pruning.admm import ADMM
from compress.compressors.quantization.bits import cost
from compress.compressors.quantization.gptq import GPTQ
from compress.compressors.quantization.gptq_sparse import GPTQSparse
from compress.events import outcome
from compress.moments import Moments
from compress.planning.goals import planner_of
from compress.planning.law import Law
from compress.planning.menus import menus_of
from compress.planning.shaped import ShapedPlanner
from compress.planning.shapes import Shape, reshaped, stages_of
from compress.problem import LayerProblem
from compress.source import Source
from compress.weights import Dense, Masked


def problem() -> LayerProblem:
    """One whose loss has been measured, of the shape of the first q_proj of the demo model."""
    W, x, g = (normal(n, 128, seed=s, scale=1) for s, n in enumerate((128, 400, 400)))
    return LayerProblem(
        "site", Dense.of(W.bfloat16()), Moments(x.T @ x / 400), gradients=Moments(g.T @ g / 400)
    )


def test_a_correction_in_one_pass_is_that_of_two_stages() -> None:
    given = problem()
    weight = GPTQResidual.model_validate({"bits": 3, "ratio": 1 / 16}).compress(given)
    packed = GPTQ.model_validate({"bits": 3}).solve(given)
    residual = Residual.model_validate({"ratio": 1 / 16})
    slow = residual.solve(LayerProblem("site", packed, given.moments, given.W, given.gradients))
    assert torch.equal(weight.dense(), slow.dense())
    assert weight.nbytes == GPTQResidual.model_validate({"bits": 3, "ratio": 1 / 16}).predict(
        (128, 128), torch.bfloat16
    )
    assert cost(given, weight) < cost(given, packed)


def test_zeros_on_a_grid_are_those_of_two_stages() -> None:
    given = problem()
    weight = GPTQSparse.model_validate({"bits": 3, "sparsity": 0.6}).compress(given)
    pruned = ADMM.model_validate({"sparsity": 0.6, "allocation": "uniform"}).solve(given)
    slow = GPTQ.model_validate({"bits": 3}).solve(replace(given, weight=pruned, goal=given.W))
    assert isinstance(weight, Masked)
    assert torch.equal(weight.dense(), slow.dense())
    assert torch.equal(weight.plain().dense(), slow.dense())
    assert weight.parameters == 128 * 128 - round(0.6 * 128 * 128)
    assert (weight.dense() != 0).sum() <= weight.parameters
    assert weight.nbytes == 128 * 16 + 4 * -(-weight.parameters * 3 // 32) + 128 * 2 * 2


def test_zeros_on_a_grid_are_multiplied_as_integers(text: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "LlamaForCausalLM", tiny.LLAMA)
    recipe = recipes.load_one({
        "model": folder,
        "calibration": {"data": text, "samples": 4, "length": 64},
        "stages": [{"use": "gptq_sparse", "blocks": [0]}],
    })  # fmt: skip
    runs.apply(recipe, tmp_path / "out", verify=False)
    model = load(tmp_path / "out", runtime="packed")
    assert list(model.packed_report.kernels.values()).count("int4") == 7
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        found, right = model(tokens).logits, load(tmp_path / "out")(tokens).logits
    assert (found - right).norm() < 0.03 * right.norm()


@pytest.mark.parametrize(("method", "count"), [("gptq_residual", 9), ("gptq_sparse", 4)])
def test_every_option_has_the_bytes_and_the_cost_of_the_weight_that_it_makes(
    method: str, count: int
) -> None:
    site = next(s for s in Source("demo").anatomy.sites if s.shape == (128, 128))
    menu = menus_of([method])[method]
    given = problem()
    options = dict(menu.options(site, menu.costs(given, site)))
    assert len(options) == len({option.label for option in options}) == count
    for option, price in options.items():
        made = menu.of(option).model_copy(update={"polish": 0}).compress(given)
        assert (
            menu.weight(site, option).nbytes
            == made.nbytes
            == menu.of(option).compress(given).nbytes
        )
        assert price == cost(given, made)


@pytest.fixture(scope="module")
def planner(text: str, tmp_path_factory: pytest.TempPathFactory) -> ShapedPlanner:
    folder = save(tmp_path_factory.mktemp("shapes") / "model", "LlamaForCausalLM", tiny.LLAMA)
    recipe = recipes.load_one({
        "model": folder,
        "calibration": {"data": text, "samples": 8, "length": 64},
        "stages": [{"use": "ecgptq", "targets": ["all"]}],
    })  # fmt: skip
    made = planner_of(recipe, Source(folder), recipe.stages[0], ["depth", "width"])
    assert isinstance(made, ShapedPlanner)
    for _ in made.look():
        pass
    return made


def test_shapes_once_each(tmp_path: Path) -> None:
    demo = Source("demo")
    stages = list(stages_of(["depth", "width"], demo))
    assert [stage.use for stage in stages] == ["depth"] * 3 + ["width"] * 4
    gone = [demo.anatomy.layers - stage.compressor.keeps(6) for stage in stages[:3]]  # type: ignore[attr-defined]
    assert gone == [1, 2, 3]
    heads = transformers.GPT2Config(**tiny.GPT2.to_diff_dict() | {"n_head": 4})
    gpt2 = Source(save(tmp_path / "gpt2", "GPT2LMHeadModel", heads))
    assert len(list(stages_of(["width"], gpt2))) == 4  # fewer channels, and then fewer heads
    assert len(list(stages_of(["width"], gpt2, plain=True))) == 1  # no config says fewer heads


def test_a_shape_costs_what_its_stage_costs(planner: ShapedPlanner, tmp_path: Path) -> None:
    """And its matrices are those that a recipe's own stage would make."""
    for number, one in enumerate(planner.planners[1:], 1):
        (stage,) = one.shape.stages
        recipe = planner.recipe.model_copy(update={"stages": [stage]})
        shape: Shape = outcome(reshaped(stage, recipe, planner.source, tmp_path / f"{number}"))
        assert {s.name: s.shape for s in shape.source.anatomy.sites} == {
            s.name: s.shape for s in one.source.anatomy.sites
        }
        alone = planner.fits(planner.source.nbytes)[number]
        assert alone.recipe.stages == [stage]
        assert alone.cost == planner.measured(alone).expected == one.shape.kl > 0.1
        info = runs.apply(alone.recipe, tmp_path / f"{number}-out", verify=False)
        assert info["bytes"]["disk"] == alone.bytes


@pytest.mark.parametrize("number", [1, 2])
def test_a_plan_in_another_shape_keeps_to_the_size(
    number: int, planner: ShapedPlanner, tmp_path: Path
) -> None:
    one = planner.planners[number]
    budget = one.least + 20_000
    found = one.fit(budget)
    assert found.recipe.stages[0].use == found.shape.split()[0]
    assert len(found.recipe.stages) == 2
    assert found.cost > one.shape.kl
    assert float(one._costs_by_kind([found]).sum()) == pytest.approx(found.cost)
    info = runs.apply(found.recipe, tmp_path / "out", verify=number == 1)
    assert 0.98 * budget < info["bytes"]["disk"] <= found.bytes <= budget
    assert recipes.load_one(found.recipe.dump()).dump() == found.recipe.dump()


def test_the_best_shape_is_chosen_by_costs_and_then_by_measuring(planner: ShapedPlanner) -> None:
    plans = planner.fits(planner.whole.least)
    assert len(plans) == len(planner.planners)
    best = planner.fit(planner.whole.least)
    assert best.cost == min(plan.cost for plan in plans)
    chosen = outcome(planner.refine(best, 0))
    assert chosen.measured[0] == min(planner.measured(p).expected for p in plans)
    assert planner.least < planner.whole.least
    assert planner.fit(planner.least).shape


def test_shapes_that_are_predicted_to_be_far_off_are_not_measured(
    planner: ShapedPlanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, tried = planner.source.nbytes * 9 // 10, []
    for one in planner.planners:
        monkeypatch.setattr(one, "law", Law.of([0.001, 0.1, 1], [0.001, 0.1, 1]))
    monkeypatch.setattr(planner, "measured", lambda plan: tried.append(plan) or plan)
    assert outcome(planner.best(size)) == planner.fit(size)
    most = 1.5 * tried[0].expected
    near = [p for p in planner.fits(size) if not p.predicted or p.expected < most]
    assert 0 < len(tried) == len(near) < len(planner.planners)


def test_a_frontier_of_several_shapes_is_measured(planner: ShapedPlanner) -> None:
    plans = outcome(planner.frontier(3))
    assert [plan.budget for plan in plans] == planner.whole.sizes(3)
    for plan in plans:
        shapes = [planner.measured(one) for one in planner.fits(plan.budget)]
        assert plan.measured[0] == min(one.expected for one in shapes)
