"""Evaluated folders in, all that scaling laws say of them out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compress.errors import CheckpointError, DataError
from eval.compare import paired
from eval.measured import WHERE, Measured, read_checkpoint, with_unique_names
from eval.scaling import degradation
from eval.scaling.degradation import SETTINGS, Degradation, Loss, Prediction
from eval.scaling.equivalent import Equivalent, equivalent
from eval.scaling.ladder import DEMO, METRIC, Ladder, is_demo, of_checkpoints, parameters, read


@dataclass(frozen=True)
class Compressed:
    """A compressed checkpoint beside its original."""

    checkpoint: Measured
    original: Measured
    delta: float
    """nats/token more than the original, paired."""
    stderr: float
    equivalent: Equivalent | None
    """None without a ladder."""

    @property
    def size_share(self) -> float | None:
        """Of the original's bytes."""
        if not self.checkpoint.size or not self.original.size:
            return None
        return self.checkpoint.size / self.original.size


@dataclass(frozen=True)
class HeldOut:
    """A checkpoint that a law was not fitted to, and what that law said of it."""

    loss: Loss
    prediction: Prediction


@dataclass(frozen=True)
class Study:
    """What was found; ``notes`` say what was not, and why."""

    ladder: Ladder | None
    compressed: list[Compressed]
    laws: list[Degradation]
    held_out: list[HeldOut]
    notes: list[str] = field(default_factory=list)


def study(folders: Sequence[Path], *, ladder: Path | None = None) -> Study:
    """Read evaluated ``folders``, dense originals among them, and fit what can be fitted.

    ``ladder`` is a file of dense rows. Without it, three or more sizes of dense checkpoints among
    the folders are the ladder, and else, for compressed demo models, the one that comes with this.

    Raises:
        CheckpointError: a folder has no results, or a file cannot be understood.
        DataError: an original is missing, or texts differ.
    """
    rows = with_unique_names([read_checkpoint(Path(folder)) for folder in folders])
    rows = [row for row in rows if row.value(METRIC) is not None]
    if not rows:
        raise CheckpointError(f"none of these has {METRIC}; run `compress eval DIR... --data DATA`")
    originals = [row for row in rows if row.is_original]
    known, notes = _ladder(originals, ladder)
    found = [
        _compressed(row, _original(row, originals), known) for row in rows if row not in originals
    ]
    by_method: dict[str, list[Loss]] = {}
    for item in found:
        loss = _loss(item)
        if loss is not None:
            by_method.setdefault(loss.method, []).append(loss)
    laws, held = [], []
    for losses in by_method.values():
        try:
            laws.append(degradation.fit(losses))
        except DataError as error:
            notes.append(str(error))
            continue
        held += _held_out(losses)
    return Study(known, found, laws, held, notes)


def equivalents(rows: Sequence[Measured], original: Measured) -> dict[str, Equivalent]:
    """For a report: by name, what ``rows`` are worth; empty where no ladder is known."""
    ladder = _demo([original]) if original.is_original and METRIC in original.results else None
    found = {}
    for row in rows if ladder else ():
        if row is not original and row.value(METRIC) is not None:
            try:
                ladder.check(original)  # type: ignore[union-attr]
                made = _compressed(row, original, ladder).equivalent
            except DataError:  # other text: the report says so where it compares
                continue
            if made is not None:
                found[row.name] = made
    return found


def _ladder(originals: Sequence[Measured], given: Path | None) -> tuple[Ladder | None, list[str]]:
    """What the originals are held to, and notes. One that was given must fit them all."""
    known = read(Path(given)) if given else of_checkpoints(originals) or _demo(originals)
    if known is None:
        return None, ["no ladder of dense models, so no parameter equivalents"]
    try:
        notes = [note for original in originals for note in known.check(original)]
    except DataError as error:
        if given:
            raise
        return None, [f"no parameter equivalents: {error}"]
    return known, list(dict.fromkeys(notes))


def _demo(originals: Sequence[Measured]) -> Ladder | None:
    """The ladder that comes with the package, if it is for these models."""
    return read(DEMO) if DEMO.exists() and originals and all(map(is_demo, originals)) else None


def _original(row: Measured, originals: Sequence[Measured]) -> Measured:
    base = row.record.get("base", {})
    for candidate in originals:
        theirs = candidate.record.get("base", {})
        same = base.get("hash") and base.get("hash") == theirs.get("hash")
        if same or Path(str(base.get("model"))).resolve() == candidate.folder.resolve():
            return candidate
    if len(originals) == 1:
        return originals[0]
    raise DataError(
        f"{row.name}: its original, {base.get('model', 'unknown')}, is not among the folders; "
        "evaluate it on the same text and give it too; a recipe without stages makes it a folder"
    )


def _compressed(row: Measured, original: Measured, ladder: Ladder | None) -> Compressed:
    found = paired(row.results[METRIC], original.results[METRIC])
    worth = None
    if ladder is not None:
        worth = equivalent(ladder.curve, parameters(original), found.mean, found.stderr)
    return Compressed(row, original, found.mean, found.stderr, worth)


def _loss(item: Compressed) -> Loss | None:
    """The loss with its method and setting; None for a recipe without one."""
    stages = item.checkpoint.stages
    for number in reversed(range(len(stages))):
        stage = stages[number]
        setting = next((s for s in SETTINGS if isinstance(stage.get(s), int | float)), None)
        if setting is None or stage.get("pattern"):
            continue
        group = stage.get("group")
        return Loss(
            item.checkpoint.name,
            _method(item.checkpoint, number, setting),
            setting,
            float(stage[setting]),
            float(group) if isinstance(group, int) and group > 0 else 1.0,
            parameters(item.original),
            item.delta,
            item.stderr,
            item.checkpoint.size or 0.0,
        )
    return None


def _method(row: Measured, number: int, setting: str) -> str:
    """The recipe in a line without the setting: ``hadamard → rtn symmetric=False``."""
    lines = row.recipe_line.split(" → ")
    if number < len(lines):
        lines[number] = re.sub(rf" (?:{setting}|group)=[\d.]+\b", "", lines[number])
    places = [{k: v for k, v in s.items() if k in WHERE - {"use"} and v} for s in row.stages]
    where = [place for place in places if place and place != {"targets": ["blocks"]}]
    return " → ".join(lines) + (f" on {json.dumps(where)}" if where else "")


def _held_out(losses: Sequence[Loss]) -> list[HeldOut]:
    """A third of the checkpoints predicted by the law of the others."""
    kept, chosen = degradation.held_out(losses)
    try:
        law = degradation.fit(kept)
        return [
            HeldOut(loss, law.predict(loss.value, group=loss.group, parameters=loss.parameters))
            for loss in chosen
        ]
    except DataError:  # too few to spare a third
        return []
