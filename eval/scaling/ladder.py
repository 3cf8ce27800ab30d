"""Dense models of several sizes and one training: the ruler that compressed models are held to.

A ladder is a file of result rows (``eval/results.py``), one a model: its ``nll``, and in ``detail``
its ``parameters``, ``tokens`` and ``seed``. ``python -m eval.benchmarks.ladder`` trains and writes
the one that lies here, of the demo model's architecture. Dense checkpoints of three sizes or more
among the evaluated folders are a ladder as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from compress import checkpoint
from compress.errors import CheckpointError, DataError
from eval.measured import Measured
from eval.metrics.size import count_parameters
from eval.results import Result
from eval.scaling.equivalent import count
from eval.scaling.law import DRAWS, SIZES, Curve, curve, fit

DEMO = Path(__file__).parent / "pycoder.jsonl"
METRIC = "nll"
SURE = 3.0  # standard errors, by which a larger model must be worse to be left out


@dataclass(frozen=True)
class Rung:
    """One dense model."""

    name: str
    parameters: int
    nll: float
    stderr: float
    samples: tuple[float, ...]
    """nll of each window."""


@dataclass(frozen=True)
class Ladder:
    """Dense models from small to large, the text they were measured on, and their curve."""

    source: str
    rungs: tuple[Rung, ...]
    data: dict[str, Any]
    tokens: int | None
    """That each was trained on, if it is known."""
    curve: Curve
    undertrained: tuple[Rung, ...] = ()
    """Models that a smaller one of as many tokens is better than: they read too little."""

    def check(self, original: Measured) -> list[str]:
        """With which reserves the ladder holds for ``original``.

        Raises:
            DataError: it says nothing about ``original``.
        """
        text = original.results[METRIC].data
        if _text(text) != _text(self.data):
            raise DataError(
                f"{original.name}: its nll was measured on {_text(text)}, the ladder {self.source} "
                f"on {_text(self.data)}; evaluate both with the same --data and --length"
            )
        N, (low, high) = parameters(original), self.curve.limits
        if not low <= N <= high:
            raise DataError(
                f"{original.name} has {N:,} parameters, the ladder {self.source} tells of "
                f"{low:,.0f} to {high:,.0f}; give a --ladder with larger and smaller models"
            )
        notes = []
        if self.tokens:
            notes.append(
                f"the ladder's models saw {count(self.tokens)} tokens each; an original that saw "
                "more is worth more than this says (eval/scaling/equivalent.py)"
            )
        if text.get("hash") != self.data.get("hash"):
            notes.append(
                f"the ladder {self.source} was measured on other windows of {text.get('name')}: "
                "its shape is taken, its level from the original"
            )
        return notes

    def held_out(self) -> tuple[Rung, float, float, float] | None:
        """The largest size, and what the law through the others says of it: nll, low, high.

        None where there are too few sizes without it.
        """
        largest = max(rung.parameters for rung in self.rungs)
        rest = [rung for rung in self.rungs if rung.parameters < largest]
        if len({rung.parameters for rung in rest}) < SIZES:
            return None
        law = fit(*_arrays(rest))
        found, draws = law.nll(largest)
        low, high = np.percentile(draws, [2.5, 97.5])
        held = next(rung for rung in self.rungs if rung.parameters == largest)
        return held, found, float(low), float(high)


@cache
def read(path: Path) -> Ladder:
    """The ladder in a file of result rows.

    Raises:
        CheckpointError: the file is missing, or a row cannot be understood.
        DataError: the rows are not of one text and training, or of fewer than two sizes.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; give --ladder FILE") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = Result.model_validate_json(line)
            if row.metric == METRIC and row.value is not None:
                rows.append((row, int(row.detail["parameters"])))
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path}:{number}: not a row of a ladder: an {METRIC} result with `parameters` in "
                "its detail; see python -m eval.benchmarks.ladder"
            ) from error
    for what in ("tokens", "text"):
        if len({str(row.detail.get(what)) for row, _ in rows}) > 1:
            raise DataError(f"{path}: its models were trained on different {what}")
    tokens = rows[0][0].detail.get("tokens") if rows else None
    return _ladder(path.name, rows, tokens)


def of_checkpoints(originals: Sequence[Measured]) -> Ladder | None:
    """The ladder that evaluated dense checkpoints make; None for fewer than three sizes."""
    rows = [(row.results[METRIC], parameters(row)) for row in originals if METRIC in row.results]
    if len({N for _, N in rows}) < 3:
        return None
    return _ladder("the dense checkpoints", rows, None)


def parameters(original: Measured) -> int:
    """Parameters of a dense checkpoint, embeddings and head counted."""
    recorded = original.record.get("base", {}).get("parameters")
    return recorded or count_parameters(original.folder)


def is_demo(original: Measured) -> bool:
    """Whether this is the demo model, which the ladder that comes with the package is for."""
    base = original.record.get("base", {}).get("model", original.folder)
    return str(base) == "demo" or Path(base).resolve() == checkpoint.resolve("demo").resolve()


def _ladder(source: str, rows: Sequence[tuple[Result, int]], tokens: int | None) -> Ladder:
    if len({str(row.data.get("hash")) for row, _ in rows}) > 1:
        raise DataError(
            f"{source}: measured on different text; run `compress eval` on all with the same --data"
        )
    rungs = sorted(
        (
            Rung(row.checkpoint, N, row.value or 0.0, row.stderr or 0.0, tuple(row.samples))
            for row, N in rows
        ),
        key=lambda rung: rung.parameters,
    )
    undertrained = [
        rung for n, rung in enumerate(rungs) if tokens and any(_better(o, rung) for o in rungs[:n])
    ]
    rungs = [rung for rung in rungs if rung not in undertrained]
    if len({rung.parameters for rung in rungs}) < 2:
        raise DataError(f"{source}: a ladder needs two sizes at least, better {SIZES} or more")
    N, nll = _arrays(rungs)
    made = curve(N, nll, _noise(rungs))
    return Ladder(source, tuple(rungs), rows[0][0].data, tokens, made, tuple(undertrained))


def _better(smaller: Rung, larger: Rung) -> bool:
    """Whether a model is better than a larger one, beyond what the text explains."""
    if smaller.parameters == larger.parameters:
        return False
    error = (smaller.stderr**2 + larger.stderr**2) ** 0.5
    if len(smaller.samples) == len(larger.samples) > 1:
        differences = np.subtract(larger.samples, smaller.samples)
        error = float(differences.std(ddof=1)) / len(differences) ** 0.5
    return larger.nll - smaller.nll > SURE * error


def _noise(rungs: Sequence[Rung]) -> Any:
    """How the text might have fallen otherwise, float64 [draws, rungs]: the same for all of them,
    windows drawn with replacement; where these were not kept, by standard errors."""
    generator = np.random.default_rng(0)
    windows = len(rungs[0].samples)
    if windows < 2 or any(len(rung.samples) != windows for rung in rungs):
        return np.array([rung.stderr for rung in rungs]) * generator.standard_normal(
            (DRAWS, len(rungs))
        )
    samples = np.array([rung.samples for rung in rungs])
    chosen = generator.integers(0, windows, (DRAWS, windows))
    return (samples[:, chosen].mean(axis=2) - samples.mean(axis=1, keepdims=True)).T


def _arrays(rungs: Sequence[Rung]) -> tuple[Any, Any]:
    return (
        np.array([rung.parameters for rung in rungs], float),
        np.array([rung.nll for rung in rungs], float),
    )


def _text(data: dict[str, Any]) -> str:
    return f"{data.get('name')} in windows of {data.get('length')}"
