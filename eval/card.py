"""The measured results in a checkpoint's model card, between two marks, so that they stay true."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from eval.results import Result

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def update(folder: Path, rows: list[Result]) -> None:
    """Put a table of ``rows`` into ``folder/README.md``, or replace the one that is there.

    A folder without a card of ours is left alone.
    """
    path = folder / "README.md"
    if not path.is_file() or not (folder / "compression.json").is_file():
        return
    before, _, rest = path.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    table = ["## Results", "", "| metric | value | unit |", "|---|---|---|"]
    for row in rows:
        if row.value is not None:
            error = "" if row.stderr is None else f" ± {row.stderr:.2g}"
            value = f"{row.value:,.0f}" if abs(row.value) >= 1e5 else f"{row.value:.5g}"
            table.append(f"| {row.metric} | {value}{error} | {row.unit} |")
    texts = {row.data["hash"]: _described(row.data) for row in rows if "hash" in row.data}
    if texts:
        table += ["", *(f"Measured on {text}.  " for text in texts.values())]
    draft = path.with_suffix(".tmp")
    text = before.rstrip() + "\n\n" + "\n".join([BEGIN, *table, END]) + "\n" + after.lstrip("\n")
    draft.write_text(_with_metadata(text, rows) if text.startswith("---") else text)
    draft.replace(path)


def _described(data: dict[str, Any]) -> str:
    """One line about a text, a data set or a task."""
    size = f"{data.get('examples')} examples"
    if "windows" in data:
        size = f"{data['windows']} windows of {data['length']} tokens"
    part = f"{data['part']}, " if "part" in data else ""
    return f"{size} of `{data['name']}` ({part}hash `{data['hash']}`)"


def _with_metadata(text: str, rows: list[Result]) -> str:
    """The card with its results where the hub reads them (``model-index``)."""
    card: Any = ModelCard(text, ignore_metadata_errors=False)
    titles = [line for line in card.text.splitlines() if line.startswith("# ")]
    card.data.model_name = titles[0].removeprefix("# ") if titles else "model"
    card.data.eval_results = [
        EvalResult(
            task_type="text-generation" if "windows" in row.data else "other",
            dataset_type=Path(str(row.data["name"])).name,
            dataset_name=f"{Path(str(row.data['name'])).name} ({row.data.get('hash')})",
            metric_type=row.metric,
            metric_value=row.value,
        )
        for row in rows
        if row.value is not None and math.isfinite(row.value) and row.data.get("name")
    ]
    card.data.eval_results = card.data.eval_results or None
    return str(card)
