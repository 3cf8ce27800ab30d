"""Healed folders: same bytes and format, zeros where they were, other teachers, wrong teachers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
from safetensors.torch import load_file

from compress import recipe as recipes
from compress import run as runs
from compress.compressors.base import TrainingRun
from compress.compressors.distillation.distill import Distill
from compress.errors import DataError, ModelError

Apply = Callable[..., Path]
Make = Callable[..., Path]
SHORT = {"steps": 4, "samples": 16, "length": 16, "batch": 4}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tuned_folders_have_the_bytes_and_the_format_of_untuned_ones(
    family: str, apply: Apply, source: Make
) -> None:
    rtn = {"use": "rtn", "bits": 3, "group": 32}
    plain = apply(source(family), [rtn], name="plain")
    tuned = apply(source(family), [rtn, {"use": "tune_scales", **SHORT}], name="tuned")
    one, two = models.record(plain), models.record(tuned)
    assert two["bytes"] == one["bytes"] | {"disk": two["bytes"]["disk"]}
    assert two["storage"] == one["storage"]
    assert models.loaded_difference(tuned) < 5e-3
    stage = two["stages"][1]
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, tuned))
    assert {k: (t.shape, t.dtype) for k, t in before.items()} == {
        k: (t.shape, t.dtype) for k, t in after.items()
    }
    codes = [k for k in before if k.endswith("weight_packed")]
    assert codes
    changed = any(not before[k].equal(after[k]) for k in codes)
    assert changed is (stage["codes_changed"] > 0)


@pytest.mark.parametrize("pattern", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_zeros_are_the_same_before_and_after(
    pattern: dict[str, Any], apply: Apply, source: Make
) -> None:
    prune = {"use": "magnitude", **pattern}
    before = apply(source("llama"), [prune], name="before")
    heal = {"use": "distill", "targets": "blocks", **SHORT, "learning_rate": 1e-4, "patience": 9}
    after = apply(source("llama"), [prune, heal], name="after")
    assert models.record(after)["stages"][1]["best_step"] > 0
    one, two = (load_file(folder / "model.safetensors") for folder in (before, after))
    pruned = [k for k in one if k.endswith("proj.weight")]
    assert len(pruned) == 14
    for name in pruned:
        assert int((two[name] == 0).sum()) == two[name].numel() // 2
        assert (one[name] == 0).equal(two[name] == 0)
        assert not one[name].equal(two[name])


@pytest.mark.parametrize(("most", "held"), [(128, 2), (1, 1)])
def test_an_eighth_of_the_text_is_held_out_up_to_a_limit(
    most: int, held: int, apply: Apply, source: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def train(self: Distill, run: TrainingRun) -> dict[str, Any]:
        seen.append(run.held)
        return {}

    monkeypatch.setattr(runs, "HELD", most)
    monkeypatch.setattr(Distill, "train", train)
    apply(source("llama"), [{"use": "distill", **SHORT}])
    assert seen == [held]


def test_a_student_learns_from_a_wider_and_deeper_model(apply: Apply, source: Make) -> None:
    teacher = source("llama", hidden_size=96, num_hidden_layers=3, seed=1)
    stage = {"use": "distill", "teacher": str(teacher), "hidden": 0.1, **SHORT}
    folder = apply(source("llama"), [{**stage, "layers": [0, 2]}])
    assert models.loaded_difference(folder) < 5e-3
    cached = apply(source("llama"), [{"use": "distill", "cache": 64, **SHORT}], name="cached")
    assert len(list((cached.parent / ".teacher-cache").iterdir())) == 1


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_smaller_models_of_other_families_heal(family: str, apply: Apply, source: Make) -> None:
    """Fewer blocks, narrower ones, healed: a BERT by the tokens that are hidden from it."""
    smaller = [{"use": "depth", "amount": 0.5}, {"use": "width", "targets": ["mlp"], "amount": 0.5}]
    heal = {"use": "distill", **SHORT, "learning_rate": 1e-4, "patience": 9}
    model = source(family, **({"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}))
    before = apply(model, smaller, name="before", calibrated=True)
    after = apply(model, [*smaller, heal], name="after")
    record = models.record(after)
    assert record["storage"] == "dense"
    assert record["stages"][2]["best_step"] > 0
    held = record["stages"][2]["held_out_loss"]
    assert held["best"] < held["before"]
    assert models.record(before)["bytes"] == record["bytes"]
    assert models.loaded_difference(after) < 5e-3


def test_teachers_that_read_other_tokens_are_refused(
    source: Make, text: str, tmp_path: Path
) -> None:
    def refused(teacher: Path, **stage: Any) -> None:
        recipe = {
            "model": str(source("llama")),
            "calibration": {"data": text},
            "stages": [{"use": "distill", **SHORT, "teacher": str(teacher), **stage}],
        }
        next(runs.run(recipes.load_one(recipe), tmp_path / "out"))

    other = Path(shutil.copytree(source("llama"), tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="other reads text as other tokens than"):
        refused(other)
    with pytest.raises(ModelError, match="nowhere: no such model folder"):
        refused(tmp_path / "nowhere")
    with pytest.raises(DataError, match="windows of 64 tokens, but the model takes 32"):
        refused(source("llama", max_position_embeddings=32), length=64)
    assert not (tmp_path / "out").exists()
