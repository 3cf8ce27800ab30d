"""Checkpoints × metrics: what is measured, what is kept, what is shared, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import DEMO

from compress.errors import CheckpointError, DataError, ModelError, RecipeError
from eval import harness, results
from eval.harness import Notice, Progress, evaluate
from eval.metrics import DEFAULT, base, scores, speed
from eval.results import Result

QUALITY = ["nll", "perplexity", "bits_per_byte", "kl", "top1_agreement"]
FEW = {"samples": 3, "length": 16}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each model was loaded."""
    counter: Counter[str] = Counter()
    load = base.load_model

    def counted(name: str) -> Any:
        counter[name] += 1
        return load(name)

    monkeypatch.setattr(base, "load_model", counted)
    monkeypatch.setattr(harness, "load_model", counted)
    return counter


def noisy_demo(folder: Path, noise: float, original: str | None = None) -> str:
    """The demo model with noise on its weights, and a record of what it was made from."""
    shutil.copytree(DEMO, folder)
    if original is not None:
        (folder / "compression.json").write_text(json.dumps({"base": {"model": original}}))
    torch.manual_seed(0)
    tensors = load_file(DEMO / "model.safetensors")
    for name, value in tensors.items():
        tensors[name] = value + noise * value.float().std().nan_to_num() * torch.randn(value.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def rows(*args: Any, **kwargs: Any) -> dict[tuple[str, str], Result]:
    found = [event for event in evaluate(*args, **kwargs) if isinstance(event, Result)]
    return {(Path(row.checkpoint).name, row.metric): row for row in found}


def test_rows_are_kept_beside_the_weights_and_used_again(tmp_path: Path, loads: Any) -> None:
    folder = noisy_demo(tmp_path / "a", 0.1)

    def values(**change: Any) -> list[float | None]:
        options: dict[str, Any] = {"data": "demo", **FEW, **change}
        return [row.value for row in rows([folder], ["nll", "size_bytes"], **options).values()]

    first = values()
    assert [row.value for row in results.read(Path(folder))] == first
    assert loads[folder] == 1
    assert values() == first
    assert loads[folder] == 1
    assert values(force=True) == first
    assert loads[folder] == 2
    assert values(seed=1) != first
    assert loads[folder] == 3
    assert values(stride=8) != first
    assert loads[folder] == 4
    assert len(values()) == 2
    assert loads[folder] == 5
    noisy_demo(tmp_path / "b", 0.2)
    shutil.copy(tmp_path / "b" / "model.safetensors", folder)
    assert values() != first
    assert loads[folder] == 6


def test_a_copied_folder_speaks_of_itself(tmp_path: Path, loads: Any) -> None:
    folder = noisy_demo(tmp_path / "a", 0.1)
    rows([folder], ["nll"], data="demo", **FEW)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert list(rows([str(copy)], ["nll"], data="demo", **FEW)) == [("copy", "nll")]
    assert loads == {folder: 1}


def test_one_original_and_one_pass_for_many_checkpoints(
    tmp_path: Path, loads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [noisy_demo(tmp_path / f"noise{i}", 0.1 * i, "demo") for i in (1, 2, 3)]
    passes: list[bool] = []
    real = scores.run
    monkeypatch.setattr(scores, "run", lambda *a, **k: passes.append(True) or real(*a, **k))
    found = rows(folders, QUALITY, **FEW)
    assert loads == {"demo": 1, **dict.fromkeys(folders, 1)}
    assert len(passes) == 3
    assert len(found) == 15
    kl = [found[f"noise{i}", "kl"].value or 0.0 for i in (1, 2, 3)]
    assert 0 < kl[0] < kl[1] < kl[2]
    assert len({row.data["hash"] for row in found.values()}) == 1
    assert all(len(found[f"noise{i}", "nll"].samples) == 3 for i in (1, 2, 3))


def test_windows_and_sizes_are_counted_as_they_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = noisy_demo(tmp_path / "a", 0.1)
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"data": "demo", "watch": lambda *step: seen.append(step)}
    rows([folder], ["nll", "perplexity"], samples=20, length=32, **options)
    assert seen == [(16, 20), (20, 20)]  # one pass serves both, 16 windows at a time
    seen.clear()
    monkeypatch.setattr(speed, "take_turns", lambda runs, repeats: {"checkpoint": [1.0, 2.0]})
    rows([folder], ["prefill_tokens_per_s"], length=32, **options)
    assert seen == [(1, 2), (2, 2)]  # of its three sizes two are the same for short windows


def test_the_original_is_compared_with_itself(tmp_path: Path) -> None:
    folder = noisy_demo(tmp_path / "a", 0.1, "demo")
    found = rows(["demo", folder], ["kl", "generation"], **FEW)
    assert found["demo", "kl"].value == 0
    assert found["demo", "generation"].value == 1
    assert found["a", "kl"].value != 0
    assert not (DEMO / results.RESULTS).exists()


def test_baseline_is_the_original_of_all(tmp_path: Path) -> None:
    folder = noisy_demo(tmp_path / "a", 0.1)
    found = rows([folder], ["kl"], data="demo", baseline="demo", **FEW)
    assert (found["a", "kl"].value or 0) > 0
    other = noisy_demo(tmp_path / "b", 0.1)
    again = rows([folder], ["kl"], data="demo", baseline=other, **FEW)
    assert again["a", "kl"].value == 0  # not the row of the other baseline


def test_text_comes_from_the_recipes(tmp_path: Path) -> None:
    a, b = noisy_demo(tmp_path / "a", 0.1), noisy_demo(tmp_path / "b", 0.1, "demo")
    with pytest.raises(DataError, match="--data"):
        rows([a], ["nll"], **FEW)
    assert {row.data["name"] for row in rows([a, b], ["nll"], **FEW).values()} == {"demo"}
    text = tmp_path / "text.txt"
    text.write_text("".join(f"x{i} = {i}\n" for i in range(9000)))
    recipe = tmp_path / "a" / "recipe.yaml"
    for recipe_text in (
        f"calibration: {{data: {text}}}\nevaluate: {{data: ''}}\n",
        f"calibration: {{data: demo}}\nevaluate: {{data: {text}}}\n",
        f"calibration: {{data: {text}}}\nevaluate: [nll]\n",
    ):
        recipe.write_text(recipe_text)
        assert rows([a], ["nll"], **FEW)["a", "nll"].data["name"] == str(text)
    (tmp_path / "b" / "recipe.yaml").write_text("calibration: {data: ''}\n")
    assert rows([a], ["nll"], data="demo", **FEW)["a", "nll"].data["name"] == "demo"
    with pytest.raises(DataError, match="different texts"):
        rows([a, b], ["nll"], **FEW)
    rows([a, b], ["size_bytes"])  # needs no text


def test_what_does_not_apply(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=2048, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    folder = str(tmp_path)
    with pytest.raises(ModelError, match="BertModel gives no logits"):
        rows([folder], ["nll"], data="demo", **FEW)
    events = list(evaluate([folder], ["quality", "speed", "size_bytes"], data="demo", **FEW))
    assert [e.metric for e in events if isinstance(e, Result)] == [
        "prefill_tokens_per_s", "size_bytes"
    ]  # fmt: skip
    assert sum(isinstance(event, Notice) for event in events) == 6


def test_a_lost_original_is_noticed(tmp_path: Path) -> None:
    folder = noisy_demo(tmp_path / "a", 0.1, str(tmp_path / "lost"))
    events = list(evaluate([folder], ["nll"], data="demo", **FEW))
    assert any(isinstance(e, Notice) and "lost" in e.text for e in events)
    assert isinstance(events[-2], Result)
    with pytest.raises(ModelError, match="--baseline"):
        rows([folder], ["kl"], data="demo", **FEW)


def test_everything_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "eval.metrics.memory._fresh_process",
        lambda name, length: {"rss": 1, "gpu": None, "forward": True},
    )
    folder = noisy_demo(tmp_path / "a", 0.1, "demo")
    events = list(evaluate([folder], **FEW))
    assert sorted(e.metric for e in events if isinstance(e, Result)) == sorted(DEFAULT)
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in progress] == list(range(len(DEFAULT) + 1))
    assert {event.total for event in progress} == {len(DEFAULT)}
    for row in results.read(Path(folder)):
        assert set(row.versions) == {"python", "torch", "transformers", "compresskit"}
        json.dumps(row.line())


def test_a_value_that_is_no_number_is_kept(tmp_path: Path) -> None:
    folder = noisy_demo(tmp_path / "a", math.nan)
    rows([folder], ["nll"], data="demo", **FEW)
    (row,) = results.read(Path(folder))
    assert row.value is not None
    assert math.isnan(row.value)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'nll'"):
        rows(["demo"], ["nl"])
    folder = noisy_demo(tmp_path / "a", 0.1)
    (tmp_path / "a" / "recipe.yaml").write_text("{")
    with pytest.raises(CheckpointError, match="not YAML"):
        rows([folder], ["nll"])
