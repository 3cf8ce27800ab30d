"""Sites of one stage with parameters of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from compress import recipe as recipes
from compress import run as runs
from compress.errors import RecipeError
from compress.preflight import preflight
from compress.source import Source

MIXED = {"down_proj": {"bits": 5}, "*.layers.0.*": {"bits": 8, "group": 32}}


def made(stage: dict[str, Any], **rest: Any) -> recipes.Recipe:
    return recipes.load_one({"model": "demo", "stages": [stage], **rest})


def test_the_last_pattern_that_matches_counts() -> None:
    recipe = made({"use": "rtn", "bits": 4, "overrides": MIXED})
    bits = {
        site.name: recipe.stages[0].compressor_for(site).bits  # type: ignore[attr-defined]
        for site in recipe.stages[0].sites(Source("demo").anatomy)
    }
    assert bits["model.layers.1.mlp.down_proj"] == 5
    assert bits["model.layers.0.mlp.down_proj"] == 8
    assert bits["model.layers.0.self_attn.q_proj"] == 8
    assert bits["model.layers.1.self_attn.q_proj"] == 4


@pytest.mark.parametrize(
    "stage",
    [
        {"use": "rtn", "bits": 4, "overrides": MIXED},
        {"use": "gptq", "bits": 3.5, "overrides": MIXED},
        {"use": "admm", "overrides": {"down_proj": {"pattern": "2:4"}}},
        {"use": "svd", "ratio": 0.5, "overrides": {"q_proj": {"ratio": None, "rank": 8}}},
    ],
)
def test_a_dumped_recipe_is_the_same_recipe(stage: dict[str, Any]) -> None:
    recipe = made(stage)
    again = recipes.load_one(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.dump() == recipe.dump()


def test_mistakes_are_named() -> None:
    with pytest.raises(RecipeError, match=r"overrides\.down_proj\.bit: .*did you mean 'bits'"):
        made({"use": "rtn", "overrides": {"down_proj": {"bit": 5}}})
    with pytest.raises(RecipeError, match=r"overrides\.down_proj\.bits: .*less than or equal to 8"):
        made({"use": "rtn", "overrides": {"down_proj": {"bits": 9}}})
    with pytest.raises(RecipeError, match=r"overrides: expected patterns"):
        made({"use": "rtn", "overrides": {"down_proj": 5}})
    with pytest.raises(RecipeError, match="does not solve layer by layer"):
        made({"use": "distill", "overrides": {"down_proj": {"steps": 5}}})
    recipe = made({"use": "rtn", "targets": ["attention"], "overrides": {"down_proj": {"bits": 5}}})
    with pytest.raises(RecipeError, match="'down_proj' matches no weight"):
        preflight(recipe, Source("demo"))


def test_bytes_are_predicted_and_bits_are_as_said(tmp_path: Path) -> None:
    recipe = made({"use": "rtn", "bits": 4, "overrides": MIXED})
    info = runs.apply(recipe, tmp_path / "out")
    plan = preflight(recipe, Source("demo")).stages[0]
    assert plan.bytes_after == sum(site["bytes"] for site in info["sites"])
    assert info["storage"] == "compressed-tensors"


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_overriding_everything_is_the_other_recipe(method: str, text: str, tmp_path: Path) -> None:
    data = {"calibration": {"data": text, "samples": 4, "length": 64}}
    plain = {"use": method, "bits": 3, "group": 32}
    other = {"use": method, "bits": 6, "overrides": {"all": {"bits": 3, "group": 32}}}
    weights = []
    for name, stage in (("plain", plain), ("other", other)):
        runs.apply(made(stage, **data), tmp_path / name, verify=False)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_an_override_may_be_another_method() -> None:
    stage = {"use": "gptq", "overrides": {"down_proj": {"use": "svd", "ratio": 0.3}}}
    recipe = made(stage)
    again = recipes.load_one(recipe.dump())
    assert again.dump() == recipe.dump()
    (down,) = {
        type(again.stages[0].compressor_for(site)).__name__
        for site in Source("demo").anatomy.sites
        if site.role == "down_proj"
    }
    assert down == "SVD"
    for wrong, why in (
        ({"use": "rtn"}, "rtn cannot stand in for gptq"),
        ({"use": "svdd"}, "svdd"),
        ({"use": "svd", "bits": 3}, r"down_proj\.bits"),
    ):
        with pytest.raises(RecipeError, match=why):
            made({"use": "gptq", "overrides": {"down_proj": wrong}})
