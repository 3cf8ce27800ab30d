"""Low-rank stages in recipes: what a correction aims at, and what may follow factors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

import compress
from compress import recipe as recipes
from compress.calibration import forward_passes
from compress.compressors.lowrank.residual import Residual
from compress.compressors.quantization.rtn import RTN
from compress.errors import RecipeError
from compress.moments import Moments
from compress.order import check_order
from compress.problem import LayerProblem, relative_error
from compress.source import Source
from compress.weights import Dense

Apply = Callable[..., Path]
Make = Callable[..., Path]
PACKED = {"use": "rtn", "bits": 2, "group": 32}


def inputs(model: nn.Module, name: str, forwards: list[Any]) -> Tensor:
    """float32 [tokens, in]: all that a site reads, in plain forward passes."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        for forward in forwards:
            forward(model)
    handle.remove()
    return torch.cat(seen)


def slow_errors(model: Path, recipe: recipes.Recipe) -> dict[str, float]:
    """Errors of corrections made one after another, in a packed model held whole in memory."""
    opened = Source(str(model))
    student, original = compress.load(model).float(), compress.load(model).float()
    packed, residual = (stage.compressor for stage in recipe.stages)
    assert isinstance(packed, RTN)
    assert isinstance(residual, Residual)
    sites = recipe.stages[0].sites(opened.anatomy)
    wanted, stored = {}, {}
    for site in sites:
        kept = student.get_parameter(site.parameter)
        wanted[site.name] = kept.detach().T if site.layout == "conv1d" else kept.detach()
        stored[site.name] = packed.solve(
            LayerProblem(site.name, Dense.of(wanted[site.name], opened.dtype))
        )
        dense = stored[site.name].dense()
        kept.data = dense.T if site.layout == "conv1d" else dense
    found = {}
    for site in sites:
        x, y = (inputs(m, site.name, forward_passes(recipe, opened)) for m in (student, original))
        moments = Moments(x.T @ x / len(x), x.T @ y / len(x))
        goal = moments.corrected(wanted[site.name], residual.propagate)
        problem = LayerProblem(site.name, stored[site.name], moments, goal)
        answer = residual.solve(problem)
        found[site.name] = relative_error(problem, answer)
        dense = answer.dense()
        student.get_parameter(site.parameter).data = dense.T if site.layout == "conv1d" else dense
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("propagate", [0.0, 0.5])
def test_a_correction_aims_at_the_original_model(
    family: str, propagate: float, apply: Apply, source: Make, text: str
) -> None:
    model = source(family)
    residual = {"use": "residual", "rank": 6, "propagate": propagate, "loss_weighted": False}
    stages = [PACKED, residual]
    folder = apply(model, stages, calibrated=True)
    recipe = recipes.load_one(
        {"model": str(model), "calibration": {"data": text, "samples": 16}, "stages": stages}
    )
    slow = slow_errors(model, recipe)
    made = {s["name"]: s for s in models.record(folder)["sites"] if s["stage"] == "residual"}
    assert made.keys() == slow.keys()
    for name, error in slow.items():
        assert made[name]["relative_error"] == pytest.approx(error, rel=0.02), name
    assert (folder / "adapter_config.json").exists() is (family == "llama")
    assert models.loaded_difference(folder) < 5e-3


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("use", ["rtn", "nf4", "magnitude"])
def test_corrections_bring_outputs_closer(
    use: str, calibrated: bool, apply: Apply, source: Make
) -> None:
    model = source("llama")
    first = PACKED if use == "rtn" else {"use": use}
    keys = {"storage": "compact"} if use == "magnitude" else {}

    def difference(stages: list[dict[str, Any]], name: str) -> float:
        folder = apply(model, stages, name=name, calibrated=calibrated, **keys)
        assert models.loaded_difference(folder) < 0.02
        probe = models.record(folder)["expected"]["inputs"]
        ours, theirs = (models.observe(compress.load(f), probe) for f in (folder, model))
        return models.relative_difference(ours, theirs)

    alone = difference([first], "alone")
    assert difference([first, {"use": "residual", "rank": 32}], "corrected") < 0.8 * alone


def test_a_turned_model_has_no_original_to_go_back_to() -> None:
    stages = [{"use": "smoothquant"}, PACKED, {"use": "residual"}]
    recipe = recipes.load_one({"model": "demo", "stages": stages})
    with pytest.raises(RecipeError, match=r"stages.2 \(residual\) cannot follow stages.0 \(smooth"):
        check_order(recipe.stages, Source("demo").anatomy)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize(
    "second",
    [
        {"use": "gptq", "bits": 8, "group": 32},
        {"use": "distill", "steps": 2, "samples": 8, "length": 16, "batch": 4},
    ],
    ids=lambda stage: stage["use"],
)
def test_what_follows_factors(
    family: str, pivoted: bool, second: dict[str, Any], apply: Apply, source: Make
) -> None:
    svd = {"use": "svd", "ratio": 0.6, "pivoted": pivoted}
    folder = apply(source(family), [svd, second], calibrated=True)
    assert models.loaded_difference(folder) < 5e-3
    info = models.record(folder)
    kinds = {site["kind"] for site in info["sites"] if site["stage"] != "distill"}
    assert "lowrank" in kinds
    assert info["bytes"]["ideal"] < info["bytes"]["original"]
