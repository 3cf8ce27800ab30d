"""The hidden folder ``.<name>.work`` beside an output: finished blocks, training state, a draft.

One run at a time owns it. It outlives a killed run, so that the next one can go on, and goes with
the checkpoint's publication or with an error that running again cannot mend.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compress.errors import CheckpointError, CompressError
from compress.recipe import Recipe
from compress.writer import publish, versions


def work_folder(out: Path) -> Path:
    return out.absolute().parent / f".{out.name}.work"


def finished_stages(work: Path, recipe: Recipe, model_hash: str) -> int:
    """How many stages an earlier run of this very recipe has done; other work is dropped."""
    key = hashlib.sha256(
        json.dumps([recipe.dump(), model_hash, versions()], sort_keys=True).encode()
    ).hexdigest()
    kept = work / "key"
    if not kept.exists() or kept.read_text() != key:
        for path in work.glob("stage-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        kept.write_text(key)
    return max((i + 1 for i in range(len(recipe.stages)) if mark(work, i).exists()), default=0)


def mark(work: Path, number: int) -> Path:
    """The file that says a stage is done, and what it reported."""
    return work / f"stage-{number}.json"


def reported(work: Path, number: int) -> dict[str, Any]:
    """What a finished stage reported: of its training, of the shape it gave the model."""
    return json.loads(mark(work, number).read_text())


def finish(work: Path, number: int, report: dict[str, Any]) -> None:
    """Write a stage's mark, atomically."""
    path = mark(work, number)
    path.with_suffix(".tmp").write_text(json.dumps(report))
    path.with_suffix(".tmp").replace(path)


def place(draft: Path, out: Path) -> None:
    """Publish; an old folder of that name gives way only now."""
    if out.exists():
        out.rename(draft.parent / "replaced")
    publish(draft, out)


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """One run at a time may work on an output.

    Raises:
        CheckpointError: another process does.
    """
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"{work}: another process is writing this output") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def tidied(work: Path) -> Iterator[None]:
    """After an error that running again cannot mend, leave nothing behind."""
    try:
        yield
    except CompressError:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Disk errors as the one line that a person needs.

    Raises:
        CheckpointError: instead of OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(
                f"{out}: the disk is full; free some room and run again, finished blocks are kept"
            ) from error
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error})") from error


def user_cache() -> Path:
    """``compresskit`` in the user's cache: what may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "compresskit"
