"""Tasks: the same numbers as lm-evaluation-harness by itself, and each question's score kept."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import LLAMA, TEXT, context, save

from compress import data as text_data
from compress.errors import DataError, NotMeasurable, RecipeError
from eval import demo_tasks
from eval.compare import paired
from eval.harness import Progress, evaluate
from eval.metrics import get
from eval.metrics.quality import NLL, Perplexity
from eval.results import Result, read

lm_eval = pytest.importorskip("lm_eval")
QUESTIONS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    import copy

    config = copy.deepcopy(LLAMA)
    config.max_position_embeddings = 512
    return save(tmp_path_factory.mktemp("model"), "LlamaForCausalLM", config)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return demo_tasks.write(tmp_path_factory.mktemp("tasks"))


def rows(folder: str, **options: Any) -> dict[str, Result]:
    events = evaluate([folder], [], **{"limit": QUESTIONS} | options)
    return {row.metric: row for row in events if isinstance(row, Result)}


def by_itself(folder: str, tasks: list[Path], **options: Any) -> dict[str, Any]:
    """The harness on the folder, without any of our code."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks[0].parent), include_defaults=False)
    return lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": folder, "dtype": "auto"},
        device="cpu",
        tasks=[task.stem for task in tasks],
        task_manager=manager,
        **{"limit": QUESTIONS, "bootstrap_iters": 1000} | options,
    )


def test_the_numbers_are_those_of_the_harness_on_the_folder(
    model: str, written: list[Path]
) -> None:
    expected = by_itself(model, written)
    ours = rows(model, tasks=[path.stem for path in written])
    files = rows(model, tasks=[str(path) for path in written])
    for path in written:
        theirs = expected["results"][path.stem]
        for row in (ours[f"task:{path.stem}"], files[f"task:{path}"]):
            assert row.value == theirs["acc,none"]
            assert row.stderr == theirs["acc_stderr,none"]
            assert row.detail["acc_norm"] == theirs["acc_norm,none"]
            assert row.samples == [s["acc"] for s in expected["samples"][path.stem]]
            assert (row.unit, row.higher_is_better) == ("acc", True)
        assert ours[f"task:{path.stem}"].data["hash"] == files[f"task:{path}"].data["hash"]
    assert all(0 < sum(row.samples) < QUESTIONS for row in ours.values())


def test_another_metric_of_a_task_costs_no_second_run(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    real = lm_eval.simple_evaluate
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **k: ran.append(1) or real(**k))
    names = ["demo_completion", "demo_completion:acc_norm"]
    found = rows(model, tasks=names)
    assert len(ran) == 1
    normed = found["task:demo_completion:acc_norm"]
    assert normed.value == found["task:demo_completion"].detail["acc_norm"]
    assert sum(normed.samples) / QUESTIONS == pytest.approx(normed.value)
    assert [row.metric for row in read(Path(model))].count("task:demo_completion:acc_norm") == 1
    rows(model, tasks=names)  # known already
    assert len(ran) == 1
    rows(model, tasks=names, limit=QUESTIONS - 2)
    assert len(ran) == 2
    with pytest.raises(RecipeError, match="has no metric 'acc_nor'; did you mean 'acc_norm'"):
        rows(model, tasks=["demo_completion:acc_nor"])


def test_differences_of_tasks_are_paired(model: str, folders: dict[str, str]) -> None:
    a, b = rows(model, tasks=["demo_brackets"]), rows(folders["gpt2"], tasks=["demo_brackets"])
    found = paired(a["task:demo_brackets"], b["task:demo_brackets"])
    assert found.windows == QUESTIONS
    assert found.mean == pytest.approx(
        a["task:demo_brackets"].value - b["task:demo_brackets"].value  # type: ignore[operator]
    )
    assert set(a["task:demo_brackets"].slices) >= {"domain", "prompt letters"}


def local_task(folder: Path, **changes: Any) -> Path:
    lines = folder / "questions.jsonl"
    asked = [{"q": f"x{i} =", "a": f" {i}\n", "kind": f"k{i % 2}"} for i in range(QUESTIONS)]
    lines.write_text("".join(json.dumps(question) + "\n" for question in asked))
    task = {
        "task": "writes", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(lines)}}, "output_type": "generate_until",
        "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    path = folder / "writes.yaml"
    path.write_text(yaml.safe_dump(task | changes))
    return path


def test_local_tasks_of_other_kinds(model: str, tmp_path: Path) -> None:
    path = local_task(tmp_path)
    row = rows(model, tasks=[str(path)])[f"task:{path}"]
    theirs = by_itself(model, [path])["results"]["writes"]
    assert row.value == theirs["exact_match,none"]
    assert len(row.samples) == QUESTIONS
    assert set(row.slices["kind"]) == {"k0", "k1"}
    rolling = local_task(tmp_path, task="writes", output_type="loglikelihood_rolling",
                         doc_to_text="", doc_to_target="{{q}}{{a}}",
                         metric_list=[{"metric": "word_perplexity"}])  # fmt: skip
    row = rows(model, tasks=[str(rolling)])[f"task:{rolling}"]
    assert row.value == pytest.approx(
        by_itself(model, [rolling])["results"]["writes"]["word_perplexity,none"]
    )
    assert row.samples == []  # not a mean of scores
    assert row.higher_is_better is False


def test_a_group_is_one_row(model: str, tmp_path: Path, written: list[Path]) -> None:
    for path in written[:2]:
        (tmp_path / path.name).write_text(path.read_text())
    group = {
        "group": "both", "task": [path.stem for path in written[:2]],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }  # fmt: skip
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    row = rows(model, tasks=[str(tmp_path / "both.yaml")])[f"task:{tmp_path / 'both.yaml'}"]
    assert len(row.samples) == 2 * QUESTIONS
    assert row.value == pytest.approx(sum(row.samples) / len(row.samples))
    assert len(row.slices["task"]) == 2
    del group["aggregate_metric_list"]
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    with pytest.raises(RecipeError, match="name its tasks instead: demo_completion, demo_brack"):
        rows(model, tasks=[str(tmp_path / "both.yaml")], force=True)


def test_mistakes_are_named(model: str, folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        rows(model, tasks=["nowhere/task.yaml"])
    with pytest.raises(RecipeError, match="did you mean 'demo_brackets'"):
        rows(model, tasks=["demo_bracket"])
    with pytest.raises(NotMeasurable, match="does not write text"):
        rows(folders["classifier"], tasks=["demo_brackets"])
    path = local_task(tmp_path)
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(DataError, match="does not load"):
        rows(model, tasks=[str(path)])


def test_questions_are_fair_and_always_the_same() -> None:
    calibration = [d.read() for d in text_data.documents("demo", "calibration")]
    for name in demo_tasks.TASKS:
        asked = demo_tasks.questions(name)
        demo_tasks.questions.cache_clear()
        assert demo_tasks.questions(name) == asked
        assert len(asked) > 100
        for question in asked:
            right = question["choices"][question["answer"]]
            assert len(set(question["choices"])) == len(question["choices"]) >= 3
            if name == "demo_identifiers":
                assert all(choice in question["context"] for choice in question["choices"])
            if name == "demo_completion":
                assert right not in question["context"].splitlines()
        places = Counter(question["answer"] for question in asked)
        assert max(places.values()) < 0.5 * len(asked)
        whole = [q["context"][-60:] + q["choices"][q["answer"]] for q in asked[:40]]
        assert not any(text in document for text in whole for document in calibration)


def test_perplexity_is_that_of_the_harness_and_of_a_loop_by_hand(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness reads a document as the end-of-text token and then its tokens: windows of one
    document each, begun by that token, ask the same of the model."""
    given = context(model, "unused", samples=6, length=48)
    tokenizer, length = given.tokenizer, 48
    end = tokenizer.eos_token_id
    texts = [tokenizer.decode(tokenizer(TEXT)["input_ids"][i * 60 : i * 60 + 47]) for i in range(6)]
    coded = [[end, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    assert {len(ids) for ids in coded} == {length}
    tokens = torch.tensor(coded)
    given.__dict__["windows"] = text_data.Windows(
        tokens, torch.ones_like(tokens), "same", "evaluation", "hash"
    )
    total = 0.0
    with torch.no_grad():
        for ids in coded:
            for place in range(1, length):
                logits = given.model(torch.tensor([ids[:place]])).logits[0, -1]
                total -= logits.double().log_softmax(-1)[ids[place]].item()
    nll = total / (6 * 47)
    assert NLL().measure(given).value == pytest.approx(nll, rel=1e-5)

    lines = tmp_path / "questions.jsonl"
    path = local_task(tmp_path, output_type="loglikelihood_rolling", doc_to_text="",
                      doc_to_target="{{text}}", metric_list=[{"metric": "byte_perplexity"}],
                      )  # fmt: skip
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    theirs = by_itself(model, [path])["results"]["writes"]["byte_perplexity,none"]
    size = sum(len(text.encode()) for text in texts)
    perplexity = Perplexity().measure(given).value
    assert perplexity is not None
    assert theirs ** (size / (6 * 47)) == pytest.approx(perplexity, rel=1e-4)


def test_questions_are_counted_as_they_are_answered(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where git has nothing to say
    seen: list[tuple[int, int]] = []
    rows(model, tasks=["demo_brackets"], force=True, watch=lambda *step: seen.append(step))
    asked = sum(len(q["choices"]) for q in demo_tasks.questions("demo_brackets")[:QUESTIONS])
    assert seen == [(i + 1, asked) for i in range(asked)]
    assert capfd.readouterr() == ("", "")
    path = local_task(tmp_path, output_type="loglikelihood_rolling", doc_to_text="",
                      doc_to_target="{{q}}{{a}}", metric_list=[{"metric": "word_perplexity"}],
                      )  # fmt: skip
    seen.clear()
    rows(model, tasks=[str(path)], watch=lambda *step: seen.append(step))
    assert [done for done, _ in seen] == list(range(1, QUESTIONS + 1))


def test_tasks_in_a_recipe_and_progress(model: str) -> None:
    from compress import recipe

    loaded = recipe.load_one({"evaluate": {"tasks": ["demo_brackets"], "limit": 4}})
    assert recipe.load_one(loaded.dump()) == loaded
    events = list(evaluate([model], ["size_bytes"], tasks=loaded.evaluate.tasks, limit=4))
    labels = [event.label for event in events if isinstance(event, Progress)]
    assert labels == [f"{model}: size_bytes", f"{model}: task:demo_brackets", "done"]
    assert get("task:demo_brackets").name == "task:demo_brackets"
