"""Results of several checkpoints as one page to read, one to paste, and one picture.

``out.html`` stands alone: the chart's script and all styles are inside, nothing is fetched.
``out.md`` is the same for a pull request or a model card, ``out.png`` its chart, ``out.csv`` its
numbers.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from markupsafe import Markup

from compress.errors import CheckpointError, DataError
from eval import chart
from eval.compare import BETTER, SAME, is_higher_better
from eval.curves import curves
from eval.layers import layers
from eval.measured import Measured, read_checkpoint, with_unique_names
from eval.pages import environment
from eval.scaling.equivalent import Equivalent
from eval.scaling.study import equivalents
from eval.sections import is_task, slice_tables, speeds, table_csv, task_columns
from eval.table import Gap, columns, gap, plus_minus, share

QUALITY = ("nll", "bits_per_byte", "perplexity", "accuracy", "kl", "top1_agreement")
WIDTHS = (280, 340, 520, 720, chart.WIDTH, 1140)  # the page shows the widest that fits


@dataclass(frozen=True)
class Comparison:
    """What all parts of the report are written from."""

    rows: list[Measured]
    """The reference first, then from large to small."""
    reference: Measured
    metric: str
    gaps: dict[str, Gap]
    """To the reference, by checkpoint name; the reference itself has none."""
    missing: list[str]
    """Why a checkpoint is not in the chart."""
    worth: dict[str, Equivalent]
    """Parameter equivalents by checkpoint name, where a ladder of dense models is known."""

    @property
    def higher_is_better(self) -> bool:
        return is_higher_better(self.reference.results[self.metric])

    @property
    def unit(self) -> str:
        return self.reference.results[self.metric].unit

    @property
    def against(self) -> str:
        """The reference in a sentence."""
        return "the original" if self.reference.is_original else self.reference.name

    @property
    def original_size(self) -> float | None:
        """Bytes of the dense original, from itself or from what was made of it."""
        if self.reference.is_original:
            return self.reference.size
        sizes = [row.record.get("bytes", {}).get("original") for row in self.rows]
        return next((size for size in sizes if size), self.reference.size)

    def smaller(self) -> list[Measured]:
        """Comparable checkpoints smaller than the reference, smallest first."""
        limit = self.reference.size or 0
        rows = [row for row in self.rows if row.name in self.gaps and 0 < (row.size or 0) < limit]
        return sorted(rows, key=lambda row: row.size or 0)

    def loss(self, row: Measured) -> float:
        """How much worse than the reference."""
        mean = self.gaps[row.name].mean
        return -mean if self.higher_is_better else mean


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    baseline: Path | None = None,
    metric: str | None = None,
) -> list[Path]:
    """Write ``out`` (HTML) and beside it the same as ``.md``, the chart as ``.png`` and all
    numbers as ``.csv``.

    Every checkpoint is compared with ``baseline``; without one, with the first folder to which
    nothing was done, or else with the best. ``metric`` is the quality to chart, ``nll`` if it was
    measured.

    Raises:
        CheckpointError: a folder has no results, or none has a quality to chart.
    """
    out = Path(out)
    if out.suffix != ".html":
        raise CheckpointError(f"{out}: the report's name must end in .html")
    comparison = _compare([Path(folder) for folder in folders], baseline, metric)
    points = _points(comparison)
    if not points:
        raise CheckpointError(
            f"no checkpoint has both a size and {comparison.metric}; "
            "run `compress eval DIR... --metrics nll,size_bytes --data DATA`"
        )
    context = _context(comparison, out)
    specs = {
        scheme: {width: _specification(points, comparison, theme, width) for width in WIDTHS}
        for scheme, theme in (("light", chart.LIGHT), ("dark", chart.DARK))
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [out, *(out.with_suffix(suffix) for suffix in (".md", ".png", ".csv"))]
    page = environment(autoescape=True).get_template("report.html")
    paste = environment(autoescape=False).get_template("report.md")
    html = page.render(context, specs=specs, script=Markup(chart.script()))
    files[0].write_text(html, encoding="utf-8")
    files[1].write_text(paste.render(context), encoding="utf-8")
    files[2].write_bytes(chart.png(specs["light"][chart.WIDTH]))
    files[3].write_text(table_csv(comparison.rows, comparison.reference), encoding="utf-8")
    return files


def _compare(folders: list[Path], baseline: Path | None, metric: str | None) -> Comparison:
    if baseline is not None and not any(_same(folder, baseline) for folder in folders):
        folders = [Path(baseline), *folders]
    rows = with_unique_names([read_checkpoint(folder) for folder in folders])
    scored = [name for row in rows for name, result in row.results.items() if is_task(result)]
    chosen = metric or next(
        (m for m in (*QUALITY, *scored) if any(row.value(m) is not None for row in rows)), None
    )
    measured = [row for row in rows if chosen and row.value(chosen) is not None]
    if chosen is None or not measured:
        raise CheckpointError(
            f"no checkpoint has {metric or 'a quality'} to chart; "
            f"run `compress eval DIR... --metrics {metric or 'nll'} --data DATA`"
        )
    if baseline is not None:
        reference = next(row for row in rows if _same(row.folder, baseline))
        if reference not in measured:
            raise CheckpointError(
                f"{baseline}: the baseline has no {chosen}; run `compress eval {baseline}` first"
            )
    else:
        sign = -1 if is_higher_better(measured[0].results[chosen]) else 1
        best = min(measured, key=lambda row: sign * (row.value(chosen) or 0.0))
        reference = next((row for row in measured if row.is_original), best)
    gaps, missing = {}, []
    for row in rows:
        if row is reference:
            continue
        if row.value(chosen) is None:
            missing.append(f"{row.name}: {chosen} was not measured, or is not a finite number")
            continue
        try:
            gaps[row.name] = gap(row.results[chosen], reference.results[chosen])
        except DataError as error:
            missing.append(str(error))
        if row.size is None:
            missing.append(f"{row.name}: its size is not known")
    rows.sort(key=lambda row: (row is not reference, -(row.size or 0)))
    return Comparison(rows, reference, chosen, gaps, missing, equivalents(rows, reference))


def _same(a: Path, b: Path) -> bool:
    return Path(a).resolve() == Path(b).resolve()


def _points(comparison: Comparison) -> list[chart.Point]:
    points = []
    shown = [
        row
        for row in comparison.rows
        if row.size is not None and (row.name in comparison.gaps or row is comparison.reference)
    ]
    for row in shown:
        found = comparison.gaps.get(row.name)
        assert row.size is not None
        before = [other for other in shown if row.continues(other)]
        points.append(
            chart.Point(
                name=row.name,
                family=row.family,
                size=row.size,
                difference=found.mean if found else 0.0,
                stderr=found.stderr if found else 0.0,
                facts=_facts(row, comparison),
                after=max(before, key=lambda other: len(other.stages)).name if before else "",
            )
        )
    return points


def _facts(row: Measured, comparison: Comparison) -> dict[str, str]:
    """What hovering over a point tells."""
    wanted = ("size", "share", "bits_per_param", "nll", "difference", "kl", "top1_agreement")
    gaps = {row.name: comparison.gaps[row.name]} if row.name in comparison.gaps else {}
    cells = columns([row], gaps, comparison.original_size, comparison.metric)
    recipe = {"Recipe": row.recipe_line} if row.recipe_line else {}
    return recipe | {
        column.title: " ".join(filter(None, (column.cells[0].text, column.cells[0].note)))
        for column in cells
        if column.key in (*wanted, comparison.metric)
    }


def _specification(
    points: Sequence[chart.Point], comparison: Comparison, theme: chart.Theme, width: int
) -> dict[str, Any]:
    direction = "higher" if comparison.higher_is_better else "lower"
    title = f"{comparison.metric} minus {comparison.against}, {comparison.unit}"
    return chart.specification(
        points,
        title=[title, f"{direction.capitalize()} is better, and so is further left"],
        reference_size=comparison.original_size or points[0].size,
        theme=theme,
        higher_is_better=comparison.higher_is_better,
        width=width,
    )


def _context(comparison: Comparison, out: Path) -> dict[str, Any]:
    rows = comparison.rows
    return {
        "headline": _headline(comparison),
        "deck": _deck(comparison),
        "picks": _picks(comparison),
        "rows": rows,
        "reference": comparison.reference,
        "against": comparison.against,
        "columns": columns(rows, comparison.gaps, comparison.original_size, comparison.metric,
                           comparison.worth),
        "missing": comparison.missing,
        "paths": any(row.continues(other) for row in rows for other in rows),
        "families": chart.FAMILIES,
        "layers": layers(rows),
        "tasks": task_columns(rows, comparison.reference),
        "slices": slice_tables(rows, comparison.reference, comparison.metric),
        "speeds": speeds(rows),
        "curves": curves(rows),
        "texts": _texts(comparison),
        "reproduction": _reproduction(comparison),
        "commands": _commands(comparison, out),
        "picture": out.with_suffix(".png").name,
    }  # fmt: skip


def _finding(comparison: Comparison) -> Measured | None:
    """The smallest checkpoint that costs nothing, or else the one nearest to the reference.

    One that another beats in size and loss is not it, however wide its interval.
    """
    smaller = comparison.smaller()
    least, front = math.inf, []
    for row in smaller:
        if comparison.loss(row) < least:
            least = comparison.loss(row)
            front.append(row)
    harmless = [row for row in front if comparison.gaps[row.name].verdict in (SAME, BETTER)]
    return harmless[0] if harmless else min(smaller, key=comparison.loss, default=None)


def _headline(comparison: Comparison) -> str:
    """The finding in one sentence."""
    row = _finding(comparison)
    if row is None:
        return f"None of these checkpoints is smaller than {comparison.against}."
    found = comparison.gaps[row.name]
    size = share((row.size or 0) / (comparison.reference.size or 1))
    start = f"{row.name} takes {size} of {comparison.against}’s bytes"
    if found.verdict == SAME:
        return f"{start}, with no measurable difference in {comparison.metric}."
    if found.verdict == BETTER:
        return f"{start}, and its {comparison.metric} is better."
    return (
        f"{start} for {found.text} {comparison.unit} of {comparison.metric}, "
        "the smallest loss here."
    )


def _deck(comparison: Comparison) -> str:
    """The evidence for the headline."""
    row = _finding(comparison)
    if row is None:
        return ""
    found = comparison.gaps[row.name]
    text = f"The difference is {found.text} {comparison.unit}"
    if found.interval:
        low, high = (plus_minus(end, found.stderr).split(" ±")[0] for end in found.interval)
        text += f" (paired, 95% interval {low} to {high}): {found.words}"
    agreement = row.value("top1_agreement")
    if agreement is not None:
        text += f"; the most likely next token is the same {share(agreement)} of the time"
    worth = comparison.worth.get(row.name)
    if worth is not None:
        size = (row.size or 0) / (comparison.reference.size or 1)
        text += f". By the dense ladder it is {worth.sentence(size)}"
    return text + "."


def _picks(comparison: Comparison) -> list[dict[str, str]]:
    """The best checkpoint within a half, a quarter and an eighth of the original's bytes."""
    limits = (("Half the bytes", 1 / 2), ("A quarter", 1 / 4), ("An eighth", 1 / 8))
    picks: list[dict[str, str]] = []
    for title, limit in limits:
        fitting = [
            row
            for row in comparison.smaller()
            if (row.size or 0) <= limit * (comparison.original_size or 0)
        ]
        if fitting:
            row = min(fitting, key=comparison.loss)
            found = comparison.gaps[row.name]
            picks.append(
                {
                    "title": title,
                    "name": row.name,
                    "size": share((row.size or 0) / (comparison.original_size or 1)),
                    "gap": f"{found.text} {comparison.unit}",
                    "verdict": found.verdict,
                }
            )
    return picks


def _texts(comparison: Comparison) -> list[dict[str, Any]]:
    """Per prompt, what each checkpoint wrote, split where it leaves the reference's words."""
    written: dict[str, dict[str, str]] = {}
    for row in comparison.rows:
        result = row.results.get("generation")
        for text in result.detail.get("texts", []) if result else []:
            written.setdefault(text["prompt"], {})[row.name] = text["completion"]
    texts = []
    for prompt, by_name in written.items():
        expected = by_name.get(comparison.reference.name)
        completions = []
        for name, completion in by_name.items():
            same = _shared_start(completion, expected or completion)
            completions.append({"name": name, "same": same, "new": completion[len(same) :]})
        texts.append({"prompt": prompt, "completions": completions})
    return texts


def _shared_start(a: str, b: str) -> str:
    """The letters before the first that differs."""
    return "".join(
        x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    )


def _reproduction(comparison: Comparison) -> list[tuple[str, str]]:
    """The conditions under which the numbers hold; several values where checkpoints differ."""
    rows = comparison.rows
    results = [row.results[comparison.metric] for row in rows if comparison.metric in row.results]
    versions = [f"{k} {v}" for result in results for k, v in result.versions.items()]
    versions += [f"{k} {v}" for row in rows for k, v in row.record.get("versions", {}).items()]
    bases = [row.record["base"] for row in rows if row.record.get("base")]
    return [
        (title, ", ".join(dict.fromkeys(values)))
        for title, values in (
            ("Original", [f"{base.get('model')} ({base.get('hash')})" for base in bases]),
            ("Text", [_items(result.data) for result in results if result.data]),
            ("Settings", [_items(result.setup, skip="weights") for result in results]),
            ("Seed", [str(row.record["seed"]) for row in rows if "seed" in row.record]),
            ("Versions", versions),
        )
        if any(values)
    ]


def _items(values: dict[str, Any], skip: str = "") -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items() if k != skip and v is not None)


def _commands(comparison: Comparison, out: Path) -> list[str]:
    """The command lines that make the same checkpoints, numbers and report."""
    rows = comparison.rows
    folders = shlex.join(str(row.folder) for row in rows)
    metrics = ",".join(dict.fromkeys(name for row in rows for name in row.results))
    text = [r.data["name"] for r in comparison.reference.results.values() if "windows" in r.data]
    rows_of = [r.data["name"] for m, r in comparison.reference.results.items()
               if "examples" in r.data and not m.startswith("task:")]  # fmt: skip
    applied = [
        shlex.join(["compress", "apply", str(row.folder / "recipe.yaml"), "--out", str(row.folder)])
        for row in rows
        if row.recipe
    ]
    measuring = f"compress eval {folders} --metrics {shlex.quote(metrics)}"
    for option, names in (("--data", text), ("--dataset", rows_of)):
        if names:
            measuring += f" {option} {shlex.quote(str(names[0]))}"
    return [*applied, measuring, f"compress report {folders} --out {shlex.quote(str(out))}"]
