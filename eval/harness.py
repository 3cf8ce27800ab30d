"""Checkpoints × metrics → result rows, each measured once and kept beside the weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from compress import checkpoint
from compress.errors import CheckpointError, CompressError, DataError, NotMeasurable
from compress.memory import keep_large
from eval import card, results
from eval.metrics import DEFAULT, FAMILIES, get
from eval.metrics.base import Context, Metric, Settings, Watch, load_model
from eval.metrics.tasks import PREFIX as TASK
from eval.results import Result


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` measurements are finished, and ``label`` begins."""

    label: str
    done: int
    total: int


@dataclass(frozen=True)
class Notice:
    """Something that was left out, and why."""

    text: str


Event: TypeAlias = Progress | Notice


def evaluate(
    folders: Sequence[str],
    metrics: Sequence[str] | None = None,
    *,
    data: str | None = None,
    tasks: Sequence[str] = (),
    samples: int = 128,
    limit: int | None = None,
    dataset: str | None = None,
    columns: Mapping[str, str] | None = None,
    length: int | None = None,
    stride: int | None = None,
    seed: int = 0,
    baseline: str | None = None,
    force: bool = False,
    watch: Watch = lambda done, total: None,
) -> Iterator[Event | Result]:
    """Measure checkpoints: folders, hub ids, or "demo". Yields events, and a row when it is known.

    Rows are also written to ``results.jsonl`` of each local folder, of a GGUF file beside it. One
    that is already there, for the same weights, text and setup, is yielded again and not measured
    anew, unless ``force``.

    metrics   names of metrics, or of families of them (quality, size, memory, speed); None is all
              that come with this package. One that does not apply to a model is an error when it
              was named, and otherwise left out with a Notice.
    data      name of the text (compress/data.py); None is what the folders' recipes say
    tasks     of lm-evaluation-harness (eval/metrics/tasks.py); they stand for metrics ``task:…``
    limit     questions of a task or examples of a data set, at most; None is all
    dataset   rows with labels, for models that do not predict text (eval/labelled.py)
    columns   role → column of the data set, where its name does not say it
    length    tokens of a window; None is 256, or what the model takes if that is less
    stride    tokens between the starts of overlapping windows; None: they do not overlap
    baseline  the original to compare with; None is what each folder says it was made from
    watch     told, within a measurement, how many windows, questions or rows are done of how many

    Raises:
        RecipeError, PluginError: a metric is unknown, or a plug-in is broken.
        DataError: there is no text, the folders name different ones, or it is too short.
        ModelError: a checkpoint does not load, or differs from its original in vocabulary;
            NotMeasurable: a named metric does not apply.
        CheckpointError: a folder or its rows cannot be read or written.
    """
    keep_large()
    asked = [f"{TASK}{name.removeprefix(TASK)}" for name in tasks]
    named = (*(DEFAULT if metrics is None else metrics), *asked)
    wanted = list(dict.fromkeys(x for name in named for x in FAMILIES.get(name, (name,))))
    strict = {*(metrics or ()), *asked} - set(FAMILIES)
    chosen = [get(name) for name in wanted]
    # Those that compare come first: the pass over the windows that they need serves all.
    chosen.sort(key=lambda metric: not metric.needs_reference)

    originals, notices = _originals(folders, baseline)
    yield from notices
    if metrics is None and dataset is not None:
        chosen.insert(0, get("accuracy"))
    if data is None and any(metric.needs_data for metric in chosen):
        data = _data(folders, originals)
    settings = Settings(
        samples=samples, limit=limit, length=length, stride=stride, seed=seed, dataset=dataset,
        columns=columns or {},
    )  # fmt: skip
    load_original = functools.lru_cache(maxsize=1)(load_model)
    shared: dict[Any, Any] = {}
    done, total = 0, len(folders) * len(chosen)
    for folder in folders:
        context = Context(folder, data, originals[folder], settings, load_original, shared=shared,
                          watch=watch)  # fmt: skip
        local = Path(folder) if folder != "demo" and Path(folder).exists() else None
        earlier = {row.metric: row for row in results.read(local)} if local else {}
        for metric in chosen:
            yield Progress(f"{folder}: {metric.name}", done, total)
            try:
                row = None if force else _again(earlier.get(metric.name), metric, context)
                row = row or metric.measure(context)
            except NotMeasurable as error:
                if metric.name in strict:
                    raise
                yield Notice(f"{folder}: {metric.name} left out: {error}")
            else:
                if local:
                    _write(local, row)
                yield row
            done += 1
        if local and local.is_dir():
            card.update(local, results.read(local))
    yield Progress("done", done, total)


def _again(row: Result | None, metric: Metric, context: Context) -> Result | None:
    """An earlier row, if a new measurement would be of the same thing in the same way."""
    if row is None:
        return None
    now = metric.conditions(context)
    if (row.data, row.setup) != (now["data"], now["setup"]):
        return None
    return row.model_copy(update={"checkpoint": context.folder})


def _write(folder: Path, row: Result) -> None:
    try:
        results.write(folder, [row])
    except OSError as error:
        raise CheckpointError(
            f"{results.rows_file(folder)}: {error.strerror}; make the folder writable"
        ) from error


def _originals(
    folders: Sequence[str], baseline: str | None
) -> tuple[dict[str, str | None], list[Notice]]:
    """What each folder is compared with. The original of another folder is compared with itself."""
    found: dict[str, str | None] = {}
    notices = []
    for folder in folders:
        name = baseline or checkpoint.original(folder)
        if name is not None and baseline is None:
            try:
                checkpoint.resolve(name)
            except CompressError as error:  # the folder may have been moved without its original
                notices.append(Notice(f"{folder}: measured without its original {name}: {error}"))
                name = None
        found[folder] = name
    known = {checkpoint.resolve(name) for name in found.values() if name is not None}
    for folder in folders:
        if found[folder] is None and checkpoint.resolve(folder) in known:
            found[folder] = folder
    return found, notices


def _data(folders: Sequence[str], originals: dict[str, str | None]) -> str | None:
    """The one text that the folders' recipes name; None when they name none.

    Raises:
        DataError: they name several, so that the rows could not be compared.
    """
    names: dict[str, str] = {}
    for folder in folders:
        name = _recipe_data(checkpoint.resolve(folder))
        if name is None and _is_demo(originals[folder] or folder):
            name = "demo"
        if name is not None:
            names.setdefault(name, folder)
    if len(names) > 1:
        said = ", ".join(f"{name} ({folder})" for name, folder in names.items())
        raise DataError(f"the checkpoints' recipes name different texts: {said}; give --data")
    return next(iter(names), None)


def _recipe_data(folder: Path) -> str | None:
    """The text to evaluate on, or else the text it was calibrated on: their parts are disjoint."""
    path = folder / "recipe.yaml"
    if not path.exists():
        return None
    try:
        recipe = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise CheckpointError(f"{path}: not YAML; give --data") from error
    for section in ("evaluate", "calibration"):
        found = recipe.get(section) if isinstance(recipe, dict) else None
        if isinstance(found, dict) and found.get("data"):
            return found["data"]
    return None


def _is_demo(name: str) -> bool:
    return checkpoint.resolve(name) == checkpoint.resolve("demo")
