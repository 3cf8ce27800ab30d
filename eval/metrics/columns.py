"""What is known of each prediction or example, so that a metric can be read slice by slice.

Compression often hurts some of the data more than the mean shows: rare tokens, short contexts, one
kind of text. A *column* says of every prediction which label it has: a folder, a language, a
number cut into thirds. ``eval/slices.py`` compares two checkpoints label by label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from compress.objective import IGNORED
from eval.metrics.base import Context
from eval.metrics.examples import from_context
from eval.results import Part

SMALLEST = 0.02  # share of the predictions under which a label is counted among the others
MOST = 12  # labels of a column
NUMBERS = 8  # a column of more different numbers than this is cut into thirds
OTHER = "other"


@dataclass(frozen=True)
class Labels:
    """One column. ``index``, int64 [examples, positions], has the label's number, or -1."""

    names: list[str]
    index: Tensor


def labels(context: Context) -> dict[str, Labels]:
    """The columns of a data set; or of text how often a token occurs, how many tokens stand before
    it, and whatever the source says of its documents. Empty for text without targets."""
    if "labels" not in context.cache:
        found = of_examples(context.labelled.columns) if context.reads_dataset else None
        context.cache["labels"] = _of_text(context) if found is None else found
    return context.cache["labels"]


def documents(context: Context) -> list[int]:
    """Of each example, the document that most of its predictions are from; empty if not known."""
    owners = None if context.reads_dataset else _owners(context)
    return [] if owners is None else torch.mode(owners, 1).values.tolist()


def parts(
    columns: Mapping[str, Labels], values: Tensor, counts: Tensor
) -> dict[str, dict[str, Part]]:
    """What each label holds of a metric: values and counts float [examples, positions]."""
    found: dict[str, dict[str, Part]] = {}
    for column, labelled in columns.items():
        found[column] = {}
        for number, name in enumerate(labelled.names):
            chosen = (labelled.index == number) * counts
            inside = chosen.sum(1)
            rows = inside.nonzero()[:, 0]
            sums = (values * chosen).sum(1)[rows]
            found[column][name] = Part(
                examples=rows.tolist(),
                sums=[float(f"{v:.9g}") for v in sums.tolist()],
                counts=inside[rows].tolist(),
            )
    return found


def thirds(values: Tensor, kept: Tensor) -> Labels:
    """Numbers cut into three bands that hold about a third each of what is ``kept``."""
    inside = values[kept].double().sort().values
    cuts = [inside[max(len(inside) * k // 3 - 1, 0)].item() for k in (1, 2)]
    cuts = [cut for cut in dict.fromkeys(cuts) if cut < inside[-1].item()]
    index = sum(((values > cut).long() for cut in cuts), torch.zeros_like(values).long())
    ends = [f"{cut:,.4g}" for cut in cuts]
    names = [f"≤ {ends[0]}"] if ends else ["all"]
    names += [f"{a} to {b}" for a, b in pairwise(ends)]
    names += [f"> {ends[-1]}"] if ends else []
    return Labels(names, index.where(kept, -1))


def of_rows(rows: Sequence[Mapping[str, Any]], owners: Tensor, kept: Tensor) -> dict[str, Labels]:
    """Columns of a table whose row number is ``owners`` [examples, positions] of a prediction.

    Many different numbers are cut into thirds; of words the most frequent are kept and the rest
    become "other". A column is left out if one label holds all, or none holds two rows.
    """
    found = {}
    for column in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(column) for row in rows]
        if all(isinstance(v, int | float) for v in values) and len(set(values)) > NUMBERS:
            numbers = torch.tensor([float(v) for v in values if v is not None])
            labelled = thirds(numbers[owners], kept)
        else:
            labelled = _words([str(v) for v in values], owners, kept)
        if len(labelled.names) > 1:
            found[column] = labelled
    return found


def of_examples(rows: Sequence[Mapping[str, Any]]) -> dict[str, Labels]:
    """Columns of a table with a row for each example, which has one prediction; what is no single
    word or number is left out."""
    single = [{k: v for k, v in row.items() if isinstance(v, str | int | float)} for row in rows]
    numbers = torch.arange(len(rows))[:, None]
    return of_rows(single, numbers, torch.ones_like(numbers).bool())


def _words(values: Sequence[str], owners: Tensor, kept: Tensor) -> Labels:
    held = torch.bincount(owners[kept], minlength=len(values))
    shares: dict[str, int] = {}
    counts: dict[str, int] = {}
    for value, count in zip(values, held.tolist(), strict=True):
        if count:
            shares[value] = shares.get(value, 0) + count
            counts[value] = counts.get(value, 0) + 1
    total = max(sum(shares.values()), 1)
    large = [v for v in shares if shares[v] >= SMALLEST * total and counts[v] > 1]
    names = sorted(large, key=lambda v: -shares[v])[:MOST]
    if not names:
        return Labels([], torch.full_like(owners, -1))
    rest = [OTHER] if len(names) < len(shares) else []
    numbers = {name: number for number, name in enumerate(names)}
    of_row = torch.tensor([numbers.get(value, len(names)) for value in values])
    return Labels([*names, *rest], of_row[owners].where(kept, -1))


def _of_text(context: Context) -> dict[str, Labels]:
    examples = from_context(context)
    targets = examples.targets
    if targets is None:
        return {}
    kept = targets != IGNORED
    seen = targets.where(kept, 0)
    times = torch.bincount(targets[kept], minlength=int(seen.max()) + 1)
    before: Tensor | None
    if context.settings.stride is not None:  # windows that overlap count their own tokens
        before = (torch.arange(targets.shape[1]) + 1).expand_as(targets)
    else:
        place = torch.arange(context.windows.tokens.shape[1])
        before = from_context(context, place.expand_as(context.windows.tokens)).token_bytes
    assert before is not None
    found = {"token frequency": thirds(times[seen], kept), "context tokens": thirds(before, kept)}
    owners = _owners(context)
    if owners is not None:
        found |= of_rows(context.windows.columns, owners, kept)
    return found


def _owners(context: Context) -> Tensor | None:
    """The document of each prediction, int64 [examples, positions]."""
    if context.windows.documents is None:
        return None
    return from_context(context, context.windows.documents).token_bytes
