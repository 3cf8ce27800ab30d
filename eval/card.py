"""The measured results in a checkpoint's model card, between two marks, so that they stay true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    draft.write_text(
        before.rstrip() + "\n\n" + "\n".join([BEGIN, *table, END]) + "\n" + after.lstrip("\n")
    )
    draft.replace(path)


def _described(data: dict[str, Any]) -> str:
    """One line about a text, a data set or a task."""
    size = f"{data.get('examples')} examples"
    if "windows" in data:
        size = f"{data['windows']} windows of {data['length']} tokens"
    part = f"{data['part']}, " if "part" in data else ""
    return f"{size} of `{data['name']}` ({part}hash `{data['hash']}`)"
