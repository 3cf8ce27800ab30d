"""Tasks of lm-evaluation-harness, with its own numbers and each question's score beside them.

A task is ``task:NAME`` or, where it has several metrics, ``task:NAME:METRIC``. NAME is a YAML file
(paths in it are relative to where the command runs, as for the harness), one of the project's own
(``eval/demo_tasks.py``), or a task or group that the harness brings, whose data is on the hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from compress.errors import (
    DataError,
    NotMeasurable,
    PluginError,
    RecipeError,
    did_you_mean,
    first_line,
)
from compress.objective import family
from eval import demo_tasks
from eval.metrics.base import Context, Metric, Watch
from eval.metrics.columns import of_examples, parts
from eval.metrics.scores import LOGITS
from eval.results import Result

PREFIX = "task:"
BOOTSTRAP = 1000  # resamples, for metrics whose standard error has no formula
CONTEXT = 2048  # tokens a model may be asked to read at once, where its config does not say


class HarnessTask(Metric):
    """The first metric of the task, or the one that is named; all of them stand in ``detail``."""

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]  # of the instance: a class serves many tasks
        task, _, chosen = name.removeprefix(PREFIX).partition(":")
        self.task, self.chosen = task, chosen
        self.unit = chosen or "score"  # type: ignore[misc]

    def conditions(self, context: Context) -> dict[str, Any]:
        """The questions are the data; their hash is of all that the model is given."""
        loaded = _load(self.task, context.shared)
        limit = context.settings.limit
        digest, count = hashlib.sha256(), 0
        for task in loaded["tasks"].values():
            for number, doc in enumerate(task.eval_docs):
                if limit is not None and number >= limit:
                    break
                choices = task.doc_to_choice(doc) if _chooses(task) else ""
                asked = [task.doc_to_text(doc), task.doc_to_target(doc), choices]
                digest.update(json.dumps(asked, default=str).encode())
                count += 1
        data = {"name": self.task, "hash": digest.hexdigest()[:16], "examples": count}
        shots = {task.config.num_fewshot or 0 for task in loaded["tasks"].values()}
        setup = {"weights": context.fingerprint(context.folder), "shots": max(shots)}
        return {"data": data, "setup": setup | ({} if limit is None else {"limit": limit})}

    def measure(self, context: Context) -> Result:
        key = f"answers of {self.task}"
        if key not in context.cache:
            context.cache[key] = _run(self.task, context)
        answers = context.cache[key]
        results = answers["results"]
        group = next(iter(_load(self.task, context.shared).get("groups") or results))
        found = _numbers(results[group])
        if not found:
            raise RecipeError(f"group '{self.task}' has no metric of its own; name its tasks "
                              f"instead: {', '.join(answers['samples'])}")  # fmt: skip
        metric = self.chosen or next(iter(found))
        if metric not in found:
            raise RecipeError(f"task '{self.task}' has no metric '{metric}'"
                              f"{did_you_mean(metric, found)}")  # fmt: skip
        value, stderr = found[metric]
        self.unit = metric  # type: ignore[misc]
        docs, scores = _examples(answers, metric)
        directions: dict[str, Any] = next(iter(answers["higher_is_better"].values()))
        detail: dict[str, Any] = {name: number for name, (number, _) in found.items()}
        detail |= {f"{name}_stderr": e for name, (_, e) in found.items() if e is not None}
        return self.result(
            context,
            value,
            stderr=stderr,
            samples=scores,
            higher_is_better=directions.get(metric),
            slices=_slices(docs, scores),
            detail=detail,
        )


def _run(name: str, context: Context) -> dict[str, Any]:
    """What the harness says of the checkpoint's model."""
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.models import huggingface

    kind = family(context.model)
    if kind not in ("causal", "encoder-decoder"):
        raise NotMeasurable(f"{type(context.model).__name__} does not write text; tasks need that")
    if context.tokenizer is None:
        raise NotMeasurable(f"{context.folder}: tasks need a tokenizer and the folder has none")
    loaded = _load(name, context.shared)
    vocabulary = context.model.config.get_text_config().vocab_size
    bar = mock.patch.object(huggingface, "tqdm", _told(context.watch))
    # What it asks git and other programs for its own record, they would answer on the screen.
    record = mock.patch.multiple(evaluator, get_git_commit_hash=str, add_env_info=id)
    with _quiet(), bar, record:
        model = huggingface.HFLM(
            pretrained=context.model,
            backend="causal" if kind == "causal" else "seq2seq",
            tokenizer=context.tokenizer,
            batch_size=max(1, min(context.settings.batch, LOGITS // (CONTEXT * vocabulary))),
        )
        found = simple_evaluate(
            model=model,
            tasks=list((loaded.get("groups") or loaded["tasks"]).values()),
            task_manager=loaded["manager"],
            limit=context.settings.limit,
            bootstrap_iters=BOOTSTRAP,
        )
    assert found is not None
    return dict(found)


def _load(name: str, shared: dict[Any, Any]) -> dict[str, Any]:
    """The harness' task objects by name, its groups, and their manager; loaded once in a run.

    Raises:
        PluginError: the harness is not installed.
        RecipeError: no task has this name. DataError: its data cannot be read.
    """
    key = ("task", name)
    if key not in shared:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise PluginError(
                f"task '{name}' needs lm-evaluation-harness; pip install 'compresskit[tasks]'"
            ) from error
        with _quiet():
            shared[key] = _load_quietly(name, TaskManager)
    return shared[key]


def _load_quietly(name: str, manager_class: Any) -> dict[str, Any]:
    path = Path(name)
    spec: Any = name
    if name in demo_tasks.TASKS:
        manager = manager_class(include_defaults=False)
        spec = demo_tasks.configuration(name) | {"custom_dataset": _in_memory(name)}
    elif path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"task '{name}': no such file")
        manager = manager_class(include_path=str(path.parent), include_defaults=False)
        places = {e.yaml_path: n for n, e in manager.task_index.items() if e.yaml_path}
        spec = places.get(path) or places.get(path.resolve()) or str(path)
    else:
        if name.startswith("demo"):
            raise RecipeError(f"no task is called '{name}'{did_you_mean(name, demo_tasks.TASKS)}")
        manager = manager_class()  # reads some thousand files, seconds
        known = [*demo_tasks.TASKS, *manager.all_tasks]
        if name not in known:
            raise RecipeError(f"no task is called '{name}'{did_you_mean(name, known)}")
    try:
        loaded = dict(manager.load([spec]))
        for task in loaded["tasks"].values():
            if task.config.num_fewshot is None:
                task.set_config(key="num_fewshot", value=0)
        return loaded | {"manager": manager}
    except Exception as error:
        reason = first_line(error)
        raise DataError(
            f"task '{name}' does not load ({reason}); without a network give a YAML file whose "
            f"data is local, or one of {', '.join(demo_tasks.TASKS)}"
        ) from error


def _in_memory(name: str) -> Any:
    def dataset(**_: Any) -> dict[str, Any]:
        import datasets

        return {"test": datasets.Dataset.from_list(demo_tasks.questions(name))}

    return dataset


def _chooses(task: Any) -> bool:
    return task.get_config("output_type") == "multiple_choice"


def _numbers(results: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Metric → (value, standard error), of the first filter."""
    found: dict[str, tuple[float, float | None]] = {}
    for key, value in results.items():
        metric, comma, which = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = results.get(f"{metric}_stderr,{which}")
            known = float(error) if isinstance(error, int | float) else None
            found.setdefault(metric, (float(value), known))
    return found


def _examples(answers: Mapping[str, Any], metric: str) -> tuple[list[Any], list[float]]:
    """Questions and their scores, in order; none where the metric is not a mean of scores."""
    docs: list[Any] = []
    scores: list[float] = []
    for task, samples in answers["samples"].items():
        first = samples[0]["filter"] if samples else None
        for sample in samples:
            score = sample.get(metric)
            if not isinstance(score, int | float):
                return [], []
            if sample["filter"] == first:
                docs.append({"task": task, **sample["doc"],
                             "prompt letters": len(sample["arguments"][0][0])})  # fmt: skip
                scores.append(float(score))
    return docs, scores


def _slices(docs: list[Any], scores: list[float]) -> Any:
    if not docs:
        return {}
    values = torch.tensor(scores, dtype=torch.float64)[:, None]
    return parts(of_examples(docs), values, torch.ones_like(values))


def _told(watch: Watch) -> type[tqdm[Any]]:
    """A bar of the harness, which tells ``watch``; several in a row count on."""
    done = total = 0

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            nonlocal done, total
            if not self.n:
                total += int(self.total or 0)
            done += int(n or 0)
            watch(done, total)
            return super().update(n)

    return Bar


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the harness prints; what goes wrong comes as an exception."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
