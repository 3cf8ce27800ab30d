"""Recipes: what is understood, what is refused and how, and that YAML loses nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress import recipe as recipes
from compress import registry
from compress.errors import RecipeError
from compress.order import check_order
from compress.recipe import Recipe, Stage, load, load_one
from compress.source import Source

FAST = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
share = st.floats(0.01, 0.99)
size = st.integers(1, 4096)
training = {"steps": size, "learning_rate": st.floats(1e-6, 1), "batch": size, "kl_share": share}
PARAMETERS: dict[str, list[dict[str, st.SearchStrategy[Any]]]] = {
    "magnitude": [
        {"sparsity": share, "per": st.sampled_from(["layer", "row", "global"])},
        {"pattern": st.sampled_from(["2:4", "1:4", "4:8", "1:3"])},
        {"threshold": st.floats(0, 1)},
    ],
    "rtn": [
        {
            "bits": st.integers(2, 8),
            "group": st.one_of(st.integers(8, 4096), st.just("channel")),
            "symmetric": st.booleans(),
        }
    ],
    "int8": [{}],
    "nf4": [{"group": st.sampled_from([64, 128, 256, 512]), "double_quant": st.booleans()}],
    "svd": [{"rank": size}, {"ratio": share}, {"energy": share}],
    "lora": [{"rank": size, "alpha": st.floats(0.1, 100), **training}],
    "distill": [
        {"norms": st.booleans(), **training},
        {"loss": st.sampled_from(["forward", "reverse", "skewed", "js"]), "cache": size},
        {"hidden": share, "attention": share, "on_policy": share, "recompute": st.booleans()},
    ],
    "tune_scales": [{"reround": st.booleans(), **training}],
}
patterns = st.lists(
    st.sampled_from(["blocks", "all", "q_proj", "model.layers.1.*", "re:up$"]), min_size=1
)
layers = st.one_of(
    st.integers(-4, 9), st.lists(st.integers(-4, 9), min_size=1), st.sampled_from(["0-3", "2-2"])
)


@st.composite
def stages(draw: st.DrawFn) -> dict[str, Any]:
    use = draw(st.sampled_from(sorted(PARAMETERS)))
    stage: dict[str, Any] = {"use": use}
    for key, values in draw(st.sampled_from(PARAMETERS[use])).items():
        if draw(st.booleans()):
            stage[key] = draw(values)
    for key, values in {"targets": patterns, "skip": patterns, "blocks": layers}.items():
        if draw(st.booleans()):
            stage[key] = draw(values)
    return stage


@st.composite
def raw_recipes(draw: st.DrawFn) -> dict[str, Any]:
    optional = {
        "model": st.sampled_from(["demo", "org/model", "./folder"]),
        "calibration": st.fixed_dictionaries(
            {}, optional={"data": st.text("abc.:", max_size=8), "samples": size}
        ),
        "seed": st.integers(0, 10**6),
        "untie": st.booleans(),
        "storage": st.sampled_from(["plain", "compact"]),
        "evaluate": st.one_of(
            st.lists(st.sampled_from(["nll", "size_bytes"])),
            st.fixed_dictionaries({}, optional={"samples": size, "data": st.just("demo")}),
        ),
    }
    raw = {key: draw(values) for key, values in optional.items() if draw(st.booleans())}
    return raw | {"stages": draw(st.lists(stages(), max_size=3))}


@FAST
@given(raw_recipes())
def test_a_recipe_survives_yaml(raw: dict[str, Any]) -> None:
    recipe = load_one(raw)
    again = load_one(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    for stage, given_stage in zip(recipe.stages, raw["stages"], strict=True):
        for key, value in given_stage.items():
            if key not in ("use", "targets", "skip", "blocks"):
                assert getattr(stage.compressor, key) == value


@FAST
@given(raw_recipes(), st.data())
def test_a_misspelt_key_is_a_recipe_error_with_its_place(
    raw: dict[str, Any], data: st.DataObject
) -> None:
    stage = data.draw(stages())
    raw["stages"].append(stage)
    top = data.draw(st.booleans())
    node, known = (raw, Recipe.model_fields) if top else (stage, _stage_keys(stage))
    key = data.draw(st.sampled_from(sorted(known)))
    i = data.draw(st.integers(0, len(key) - 1))
    typo = data.draw(
        st.sampled_from([key[:i] + key[i + 1 :], key[:i] + key[i] + key[i:], key.upper()])
    )
    if typo in known or (typo == "data" and top):
        return
    node[typo] = 1
    with pytest.raises(RecipeError) as caught:
        load_one(raw)
    place = typo if top else f"stages.{len(raw['stages']) - 1}.{typo}"
    text = str(caught.value)
    assert text.startswith(f"recipe: {place}: unknown key; ")
    if typo.islower() and len(key) > 4:
        assert f"did you mean '{key}'?" in text
    assert "\n" not in text


def _stage_keys(stage: dict[str, Any]) -> set[str]:
    return {*registry.get(stage["use"]).model_fields, "use", "targets", "skip", "blocks"} - {"use"}


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([1]),
    st.just({}), st.just({"a": 1}), st.just([{"b": None}]),
)  # fmt: skip


@settings(FAST, max_examples=120)
@given(raw_recipes(), st.data())
def test_any_wrong_value_is_a_recipe_error(raw: dict[str, Any], data: st.DataObject) -> None:
    stage = data.draw(stages())
    raw["stages"].append(stage)
    node, keys = data.draw(
        st.sampled_from([(raw, [*Recipe.model_fields, "variants"]), (stage, _stage_keys(stage))])
    )
    node[data.draw(st.sampled_from(sorted(keys)))] = data.draw(scalars)
    try:
        made = load(raw).values()
    except RecipeError as error:
        refusal = str(error)
    else:
        refusal = "recipe: none"
        assert all(load_one(yaml.safe_load(recipe.to_yaml())) == recipe for recipe in made)
    assert refusal.startswith("recipe: ")
    assert "\n" not in refusal


# what a newcomer gets wrong


def refused(raw: Any, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load(raw, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"use": "rnt"}, "stages.0.use: no compressor is called 'rnt'; did you mean 'rtn'?"),
        ({"use": "rtn", "bits": 9}, "stages.0.bits: input should be less than or equal to 8"),
        ({"use": "rtn", "bits": 1}, "(given: 1)"),
        ({"use": "rtn", "bits": "four"}, "stages.0.bits: input should be a valid integer"),
        ({"use": "rtn", "group": 4}, "group 4 is below 8"),
        ({"use": "nf4", "group": 32}, "input should be 64, 128, 256 or 512 (given: 32)"),
        ({"use": "magnitude", "sparsity": 1}, "input should be less than 1"),
        ({"use": "magnitude", "sparsity": math.nan}, "stages.0.sparsity"),
        ({"use": "distill", "learning_rate": math.inf}, "should be a finite number"),
        ({"use": "magnitude", "pattern": "2:4", "sparsity": 0.3}, "drop 'sparsity'"),
        ({"use": "svd", "rank": 4, "ratio": 0.5}, "not rank and ratio"),
        ({"use": "svd", "ratio": 0}, "greater than 0"),
        ({"use": "rtn", "blocks": "5-2"}, "such as 7, [0, 1, -1] or \"2-5\", not '5-2'"),
        ({"use": "rtn", "blocks": []}, "expected layer numbers"),
        ({"use": "rtn", "targets": 5}, "stages.0.targets: input should be a valid list"),
        ({"bits": 4}, "a stage is a mapping with a 'use' key"),
        ("rtn", "a stage is a mapping with a 'use' key"),
    ],
)
def test_wrong_stages(stage: Any, message: str) -> None:
    assert message in refused({"stages": [stage]})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"data": "demo"}, "data: unknown key; it is called calibration.data"),
        ({"modle": "demo"}, "did you mean 'model'?"),
        ({"calibration": {"sample": 3}}, "calibration.sample: unknown key; did you mean 'samples'"),
        ({"calibration": "demo"}, "calibration: input should be a valid dictionary"),
        ({"calibration": [1]}, "calibration: input should be a valid dictionary"),
        ({"calibration": {"length": 4}}, "calibration.length: input should be greater"),
        ({"evaluate": {"metric": []}}, "did you mean 'metrics'?"),
        ({"stages": {"use": "rtn"}}, "stages: expected a list"),
        ({"variants": {}}, "variants: expected a mapping"),
        ({"variants": {"a": []}, "stages": []}, "either stages or variants"),
        ({"variants": {4: []}}, "'4' cannot be a folder name; quote numbers"),
        ({"variants": {"a/b": []}}, "cannot be a folder name"),
        ({"variants": {"a": [{"use": "rnt"}]}}, "variants.a.0.use: no compressor"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0"),
        ({"model": Path("x")}, "only plain values"),
    ],
)
def test_wrong_recipes(raw: Any, message: str) -> None:
    assert message in refused(raw)


def test_wrong_files(tmp_path: Path) -> None:
    assert "no such recipe file" in refused(tmp_path / "none.yaml")
    path = tmp_path / "r.yaml"
    path.write_text("model: demo\nstages: [\n")
    assert refused(path).startswith(f"{path}:3: ")
    path.write_text("- just\n- a list\n")
    assert "expected keys such as model and stages" in refused(path)
    path.write_bytes(b"\x00\xff\xfe")
    assert str(path) in refused(path)


# what is understood


def test_defaults_are_filled_in() -> None:
    dumped = load_one({"stages": [{"use": "rtn"}]}).dump()
    assert dumped["calibration"] == {"data": "demo", "samples": 128, "length": None}
    assert dumped["stages"] == [
        {"use": "rtn", "bits": 4, "group": 64, "symmetric": True, "targets": ["blocks"]}
    ]
    assert load_one({"model": "org/x"}).data == ""
    assert load_one({"stages": [{"use": "rtn", "skip": "q_proj"}]}).stages[0].skip == ["q_proj"]


@pytest.mark.parametrize(
    ("given_blocks", "expected"),
    [("2-5", [2, 3, 4, 5]), ("0 - 1", [0, 1]), (7, [7]), (-1, [-1]), ([0, 3, -1], [0, 3, -1])],
)
def test_blocks(given_blocks: Any, expected: list[int]) -> None:
    raw = {"stages": [{"use": "rtn", "blocks": given_blocks}]}
    assert load_one(raw).stages[0].blocks == expected


def test_an_unquoted_pattern_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("stages: [{use: magnitude, pattern: 2:4}]")
    assert load_one(path).stages[0].dump()["pattern"] == "2:4"


def test_variants_share_the_common_keys(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text("seed: 3\nvariants: {none: [], four: [{use: rtn, bits: 4}]}")
    both = load(path)
    assert list(both) == ["none", "four"]
    assert all(r.seed == 3 for r in both.values())
    assert both["none"].stages == []
    with pytest.raises(RecipeError, match=r"compares 2 variants \(none, four\)"):
        load_one(path)
    path.write_text("stages: []")
    assert list(load(path)) == ["both"]


def test_overrides() -> None:
    raw: dict[str, Any] = {"stages": [{"use": "rtn"}, {"use": "svd"}]}
    changed = load_one(
        raw, {"stages.0.bits": 3, "model": "org/x", "calibration.data": "t.txt", "seed": 5}
    )
    assert changed.stages[0].dump()["bits"] == 3
    assert (changed.model, changed.data, changed.seed) == ("org/x", "t.txt", 5)
    assert raw == {"stages": [{"use": "rtn"}, {"use": "svd"}]}
    variants = {"variants": {"a": [{"use": "rtn"}]}}
    assert load_one(variants, {"variants.a.0.bits": 2}).stages[0].dump()["bits"] == 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("stages.2.bits", "has 1 items at stages, numbered from 0; '2' is not one"),
        ("stages.-1.bits", "'-1' is not one"),
        ("stages.0.bit", "stages.0.bit: unknown key; did you mean 'bits'?"),
        ("stages.0.bits", "less than or equal to 8"),
        ("seed.x", "'seed' in recipe is a value"),
        ("nothing", "nothing: unknown key"),
    ],
)
def test_wrong_overrides(path: str, message: str) -> None:
    assert message in refused({"seed": 1, "stages": [{"use": "rtn"}]}, {path: 99})


# the order of stages


@pytest.fixture(scope="module")
def demo() -> Source:
    return Source("demo")


def order(demo: Source, *uses: dict[str, Any]) -> dict[str, str]:
    return check_order(load_one({"stages": list(uses)}).stages, demo.anatomy)


@pytest.mark.parametrize(
    ("uses", "kind"),
    [
        ([], "dense"),
        (["magnitude"], "sparse"),
        (["magnitude", "rtn"], "quantized"),
        (["svd"], "lowrank"),
        (["svd", "rtn"], "lowrank"),
        (["rtn", "lora"], "sum"),
        (["lora"], "dense"),
        (["rtn", "distill"], "quantized"),
        (["magnitude", "magnitude", "nf4"], "nf4"),
    ],
)
def test_kinds_are_followed_through_the_stages(demo: Source, uses: list[str], kind: str) -> None:
    kinds = order(demo, *({"use": use, "targets": ["q_proj"]} for use in uses))
    taken = {site.name for site in demo.anatomy.sites if site.role == "q_proj"}
    assert {kinds[name] for name in taken} == {kind}
    assert {kinds[name] for name in set(kinds) - taken} == {"dense"}


@pytest.mark.parametrize(
    "uses", [["rtn", "rtn"], ["rtn", "magnitude"], ["svd", "svd"], ["nf4", "svd"], ["int8", "nf4"]]
)
def test_stages_that_cannot_follow_are_refused(demo: Source, uses: list[str]) -> None:
    first, second = uses
    message = rf"stages.1 \({second}\) cannot follow stages.0 \({first}\) on model.layers.0.*is "
    with pytest.raises(RecipeError, match=message):
        order(demo, {"use": first}, {"use": second})
    order(demo, {"use": first, "blocks": [0]}, {"use": second, "blocks": "1-5"})


def test_layouts_are_checked(demo: Source) -> None:
    with pytest.raises(RecipeError, match=r"nf4 cannot compress model.embed_tokens, an embedding"):
        order(demo, {"use": "nf4", "targets": ["all"]})


def test_a_stage_knows_its_name() -> None:
    stage: Stage = load_one({"stages": [{"use": "svd", "ratio": 0.25}]}).stages[0]
    assert stage.use == "svd"
    assert recipes.load_one({"stages": [stage.dump()]}).stages[0] == stage
