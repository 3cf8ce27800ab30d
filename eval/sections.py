"""Sections of the report below its table: tasks and data sets, slices, speed; and the CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import DataError
from eval.compare import Difference, is_higher_better, paired
from eval.measured import Measured
from eval.results import Result
from eval.slices import Slice, slices, worst
from eval.table import Cell, Column, number, plus_minus

TEXT = {"nll", "perplexity", "bits_per_byte", "kl", "top1_agreement", "generation"}

NONE = "none stands out"


def is_task(result: Result) -> bool:
    """Whether a result is scored question by question: a task, or a metric on a data set."""
    return bool(result.samples) and result.metric not in TEXT


def task_columns(rows: Sequence[Measured], reference: Measured) -> list[Column]:
    """A column for each task or metric on a data set: the score, and below it the verdict."""
    found: dict[str, Result] = {}
    for row in rows:
        for metric, result in row.results.items():
            if is_task(result):
                found.setdefault(metric, result)
    columns = []
    for metric, first in found.items():
        cells = [_task_cell(row.results.get(metric), reference.results.get(metric)) for row in rows]
        size = f"{len(first.samples):,} examples"
        columns.append(Column(metric, title(metric), f"{first.unit}, {size}", cells))
    return columns


def title(metric: str) -> str:
    """``task:folder/mine.yaml:acc`` → ``mine: acc``."""
    kind, colon, rest = metric.partition(":")
    if not colon or kind not in ("task", "evaluate"):
        return metric
    name, *more = rest.rpartition("/")[2].split(":")
    return ": ".join([name.removesuffix(".yaml").removesuffix(".py"), *more])


def _task_cell(result: Result | None, reference: Result | None) -> Cell:
    if result is None or result.value is None:
        return Cell()
    text = plus_minus(result.value, result.stderr or 0.0).lstrip("+")
    note = ""
    if reference is not None and reference is not result:
        try:
            found = paired(result, reference)
            mean = plus_minus(found.mean, found.stderr) if found.mean else "0"
            note = f"{mean}, {short(found)}"
        except DataError:
            note = "on other data"
    return Cell(text, result.value, note)


def short(found: Difference) -> str:
    """The verdict in a few words, with the sample size that would settle it."""
    if found.needed is None:
        return found.verdict
    return f"{found.verdict}; {found.needed:,} would settle it"


@dataclass(frozen=True)
class SliceCell:
    """The difference on one slice. ``heat`` is 0 at the mean difference or below, 1 at twice it."""

    text: str
    hint: str
    heat: float
    worst: bool
    sort: float


@dataclass(frozen=True)
class SliceRow:
    """A checkpoint, its mean difference, its worst slice in words, and a cell for each slice."""

    name: str
    mean: str
    words: str
    cells: list[SliceCell | None]


@dataclass(frozen=True)
class SliceTable:
    """``groups`` are the data's columns with how many slices each has; ``labels`` the slices."""

    metric: str
    unit: str
    groups: list[tuple[str, int]]
    labels: list[tuple[str, str]]
    """Label, and its share of the data."""
    rows: list[SliceRow]


def slice_tables(rows: Sequence[Measured], reference: Measured, metric: str) -> list[SliceTable]:
    """One of the charted metric, and one of each task that has a slice that stands out."""
    tasks = [m for m, result in reference.results.items() if m != metric and is_task(result)]
    tables = [_slice_table(rows, reference, name) for name in (metric, *tasks)]
    return [
        table
        for name, table in zip((metric, *tasks), tables, strict=True)
        if table and (name == metric or any(row.words != NONE for row in table.rows))
    ]


def _slice_table(rows: Sequence[Measured], reference: Measured, metric: str) -> SliceTable | None:
    found: dict[str, list[Slice]] = {}
    expected = reference.results.get(metric)
    for row in rows:
        result = row.results.get(metric)
        if row is not reference and result is not None and expected is not None and result.slices:
            try:
                found[row.name] = slices(result, expected)
            except DataError:
                continue
    found = {name: own for name, own in found.items() if own}
    if not found or expected is None:
        return None
    every = {(s.column, s.label): s for own in found.values() for s in own}
    better = is_higher_better(expected)
    made = [_slice_row(row, expected, found[row.name], list(every), better)
            for row in rows if row.name in found]  # fmt: skip
    counts: dict[str, int] = {}
    for column, _ in every:
        counts[column] = counts.get(column, 0) + 1
    labels = [(label, f"{every[column, label].share:.0%}") for column, label in every]
    return SliceTable(title(metric), expected.unit, list(counts.items()), labels, made)


def _slice_row(
    row: Measured, expected: Result, own: Sequence[Slice], every: Sequence[Any], better: bool
) -> SliceRow:
    result = next(r for r in row.results.values() if r.metric == expected.metric)
    mean = paired(result, expected)
    picked = worst(own, better)
    by_name = {(s.column, s.label): s for s in own}
    words = NONE
    if picked is not None:
        words = f"{picked.name}: {picked.difference.mean:+.3g}".replace("-", "−")
    cells: list[SliceCell | None] = []
    for key in every:
        s = by_name.get(key)
        if s is None:
            cells.append(None)
            continue
        sign = -1 if better else 1
        above = sign * s.excess / abs(mean.mean) if mean.mean else 0.0
        hint = (
            f"{s.name}: {plus_minus(s.difference.mean, s.difference.stderr)}, "
            f"{plus_minus(s.excess, 0)} beside the mean ({s.low:+.3g} to {s.high:+.3g})"
        )
        text = f"{s.difference.mean:+.3g}".replace("-", "−")
        cells.append(SliceCell(text, hint, min(max(above, 0.0), 1.0), s is picked,
                               s.difference.mean))  # fmt: skip
    return SliceRow(row.name, f"{mean.mean:+.3g}".replace("-", "−"), words, cells)


@dataclass(frozen=True)
class SpeedRow:
    """One size of batch and prompt: tokens a second of each checkpoint, with the spread."""

    what: str
    cells: list[Cell]


def speeds(rows: Sequence[Measured]) -> list[SpeedRow]:
    """Prefill and decode at every size that was timed; empty where there is just one."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        for metric, word in (("prefill_tokens_per_s", "read"), ("decode_tokens_per_s", "write")):
            result = row.results.get(metric)
            for size in result.detail.get("sizes", []) if result else []:
                what = f"{word}, batch {size['batch']}, prompt {size['prompt']}"
                found.setdefault(what, {})[row.name] = size
    return [SpeedRow(what, [_speed_cell(of.get(row.name)) for row in rows])
            for what, of in found.items()]  # fmt: skip


def _speed_cell(size: Mapping[str, Any] | None) -> Cell:
    if size is None:
        return Cell()
    note = f"{number(size['low'])} to {number(size['high'])}"
    if size.get("ratio"):
        note += f", {size['ratio']:.2f}×"
    return Cell(number(size["median"]), size["median"], note)


def table_csv(rows: Sequence[Measured], reference: Measured) -> str:
    """Every number of the report, a line each, for spreadsheets and data frames.

    Lines without a column are whole metrics, those with one are its slices.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["checkpoint", "metric", "column", "slice", "value", "stderr", "unit",
                     "difference", "difference_stderr", "low", "high", "verdict", "examples",
                     "needed"])  # fmt: skip
    for row in rows:
        if row.size and "size_bytes" not in row.results:
            writer.writerow([row.name, "size_bytes", "", "", row.size, "", "bytes", *[""] * 7])
        for metric, result in row.results.items():
            expected = reference.results.get(metric)
            writer.writerow([row.name, metric, "", "", result.value, result.stderr, result.unit,
                             *_difference(result, expected)])  # fmt: skip
            try:
                own = slices(result, expected) if expected and row is not reference else []
            except DataError:
                own = []
            for s in own:
                writer.writerow([row.name, metric, s.column, s.label, "", "", result.unit,
                                 *_fields(s.difference)])  # fmt: skip
    return stream.getvalue()


def _difference(result: Result, expected: Result | None) -> list[Any]:
    if expected is None or expected is result or not result.samples:
        return [""] * 7
    try:
        return _fields(paired(result, expected))
    except DataError:
        return [""] * 7


def _fields(found: Difference) -> list[Any]:
    return [found.mean, found.stderr, found.low, found.high, found.verdict, found.windows,
            found.needed or ""]  # fmt: skip
