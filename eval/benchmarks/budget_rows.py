"""Rows of ``budgets.py``: made, kept, and set side by side."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compress import recipe as recipes
from compress import run as runs
from compress.objective import Examples
from compress.planning.measure import held_out
from compress.recipe import Recipe
from compress.source import Source
from eval.compare import paired
from eval.harness import evaluate
from eval.results import Result

SIZES = (50, 35, 25, 18, 12)  # percent of the original's bytes
STORAGE = "compact"  # zeros save bytes


@dataclass(frozen=True)
class Row:
    """What a recipe came to on evaluation text; ``nll`` has a value for each window."""

    percent: int
    seed: int
    name: str
    setting: str
    bytes: int
    nll: Result
    kl: float

    def line(self) -> str:
        return json.dumps(vars(self) | {"nll": self.nll.model_dump()})

    @staticmethod
    def of(line: str) -> Row:
        raw = json.loads(line)
        return Row(**raw | {"nll": Result.model_validate(raw["nll"])})


class Bench:
    """A model, its text, and the rows that are known."""

    def __init__(self, out: Path, model: str, data: str, seeds: Sequence[int]) -> None:
        self.model, self.data, self.seeds = model, data, seeds
        self.source = Source(model)
        self.file = out / "rows.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.rows = {(r.percent, r.seed, r.name): r for r in map(Row.of, lines)}
        self.original = self.evaluated(model)["nll"]

    def size(self, percent: int) -> int:
        return percent * self.source.nbytes // 100

    def recipe(self, seed: int, stage: dict[str, Any]) -> Recipe:
        return recipes.load_one({
            "model": self.model,
            "seed": seed,
            "calibration": {"data": self.data},
            "storage": STORAGE,
            "stages": [stage],
        })  # fmt: skip

    def add(self, percent: int, seed: int, name: str, setting: str, recipe: Recipe) -> Row:
        """A row of what the recipe makes."""
        with tempfile.TemporaryDirectory() as folder:
            made = runs.apply(recipe, Path(folder) / "out", verify=False)
            found = self.evaluated(f"{folder}/out")
        kl = found["kl"].value or 0.0
        return self.keep(Row(percent, seed, name, setting, made["bytes"]["disk"], found["nll"], kl))

    def keep(self, row: Row) -> Row:
        if row.bytes <= self.size(row.percent):
            self.rows[row.percent, row.seed, row.name] = row
            with self.file.open("a") as stream:
                stream.write(row.line() + "\n")
        loss = paired(row.nll, self.original)
        print(f"{row.percent}% seed {row.seed} {row.name} {row.setting}: {row.bytes:,} of "
              f"{self.size(row.percent):,} bytes, {loss.mean:+.4f} ± {loss.stderr:.4f}, "
              f"KL {row.kl:.4f}", flush=True)  # fmt: skip
        return row

    def evaluated(self, folder: str) -> dict[str, Result]:
        found = evaluate([folder], ["nll", "kl"], data=self.data, baseline=self.model)
        return {row.metric: row for row in found if isinstance(row, Result)}

    @cached_property
    def held(self) -> Examples:
        """Calibration text that recipes do not read."""
        found = held_out(self.recipe(self.seeds[0], {"use": "gptq"}), self.source)
        assert found
        return found


def table(bench: Bench, uniform: Sequence[str]) -> str:
    """Nll − original by size, a line for each recipe, ± the paired error over windows.

    Seeds are averaged within windows; the number of them stands behind where it is not all.
    """
    lines = ["| of the bytes | " + " | ".join(f"{percent}%" for percent in SIZES) + " |",
             "|---|" + "---:|" * len(SIZES)]  # fmt: skip
    names = list(dict.fromkeys(row.name for row in bench.rows.values()))
    for name in names:
        cells = []
        for percent in SIZES:
            rows = rows_of(bench, percent, name)
            few = f" ({len(rows)})" if len(rows) < len(bench.seeds) else ""
            cells.append(loss(nll_of(rows), bench.original) + few if rows else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name in (name for name in names if name.startswith("plan")):
        cells = []
        for percent in SIZES:
            own, best = rows_of(bench, percent, name), best_of(bench, percent, uniform)
            if not own or not best:
                cells.append("")
                continue
            over = [paired(nll_of(rows), bench.original).mean for rows in (own, best)]
            cells.append(f"{loss(nll_of(own), nll_of(best))}, "
                         f"{over[0] / over[1]:.2f} × {best[0].name}")  # fmt: skip
        lines.append(f"| {name} − best uniform | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rows_of(bench: Bench, percent: int, name: str) -> list[Row]:
    return [row for row in bench.rows.values() if (row.percent, row.name) == (percent, name)]


def best_of(bench: Bench, percent: int, names: Sequence[str]) -> list[Row]:
    """Of those that were made for every seed, the one of least loss."""
    found = [rows_of(bench, percent, name) for name in names]
    whole = [rows for rows in found if len(rows) == len(bench.seeds)]
    return min(whole, key=lambda rows: sum(row.nll.value or 0 for row in rows), default=[])


def nll_of(rows: Sequence[Row]) -> Result:
    return over_seeds([row.nll for row in rows])


def over_seeds(results: Sequence[Result]) -> Result:
    """The mean of every window."""
    columns = zip(*(result.samples for result in results), strict=True)
    return results[0].model_copy(update={"samples": [statistics.fmean(c) for c in columns]})


def loss(one: Result, other: Result) -> str:
    found = paired(one, other)
    return f"{found.mean:.4f} ± {found.stderr:.4f}"
