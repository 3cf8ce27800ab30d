"""The one row that joins measuring to drawing, and the file the rows live in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from compress.errors import CheckpointError

RESULTS = "results.jsonl"


class Part(BaseModel):
    """What a slice of the data contributes to a metric, example by example.

    Of example ``examples[k]``, ``counts[k]`` predictions belong to the slice, and ``sums[k]`` is
    the sum of the metric over them. Examples that hold nothing of the slice are left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    examples: list[int]
    sums: list[float]
    counts: list[float]


class Result(BaseModel):
    """One metric of one checkpoint.

    ``samples`` keeps the value of every example (a window of text, a question, an image) behind
    ``value``: they are what makes a *paired* comparison of two checkpoints possible (same data
    hash, same order).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str = Field(description="folder that was measured, as it was given")
    metric: str = Field(description="name of the metric, as `compress list` prints it")
    value: float | None = Field(description="the measurement; None when only `detail` speaks")
    stderr: float | None = Field(None, description="standard error of `value`, if it has one")
    unit: str = Field(description="nats/token, bytes, tokens/s, …")
    higher_is_better: bool | None = Field(None, description="None where nobody says")
    samples: list[float] = Field(default_factory=list, description="value of each example")
    documents: list[int] = Field(
        default_factory=list,
        description="of each example, the document it is from: examples of one are not independent",
    )
    slices: dict[str, dict[str, Part]] = Field(
        default_factory=dict, description="column of the data → its label → what that holds"
    )
    data: dict[str, Any] = Field(default_factory=dict, description="text: name, part, hash, counts")
    setup: dict[str, Any] = Field(default_factory=dict, description="threads, batch, repeats, …")
    versions: dict[str, str] = Field(default_factory=dict, description="python, torch, …")
    detail: dict[str, Any] = Field(default_factory=dict, description="anything else, e.g. texts")

    def line(self) -> dict[str, Any]:
        """The five keys that `compress eval --json` prints."""
        return {k: getattr(self, k) for k in ("checkpoint", "metric", "value", "stderr", "unit")}


def rows_file(checkpoint: Path) -> Path:
    """Where rows are kept: in the folder; of a GGUF file beside it, after its name."""
    folder = Path(checkpoint)
    return folder.with_name(f"{folder.name}.{RESULTS}") if folder.is_file() else folder / RESULTS


def read(folder: Path) -> list[Result]:
    """All rows of a checkpoint's ``results.jsonl``; an absent file is no rows."""
    path = rows_file(folder)
    if not path.exists():
        return []
    rows = []
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            rows.append(Result.model_validate_json(text))
        except ValueError as error:
            raise CheckpointError(
                f"{path}:{number}: not a result row ({error.__class__.__name__}); "
                "delete the file and run `compress eval` again"
            ) from error
    return rows


def write(folder: Path, rows: Iterable[Result]) -> None:
    """Merge ``rows`` into a checkpoint's: a new row replaces the old of its metric."""
    path = rows_file(folder)
    merged = {row.metric: row for row in read(folder)} | {row.metric: row for row in rows}
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(row.model_dump()) + "\n" for row in merged.values()))
    draft.replace(path)
