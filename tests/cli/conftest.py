"""The command line called in this process, and what it printed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from compress import cli
from compress import verify as verifying
from compress.source import DEMO


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on standard error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


Run = Callable[..., Answer]


@pytest.fixture(scope="session")
def verifier() -> Iterator[verifying.Verifier]:
    with verifying.Verifier() as started:
        yield started


@pytest.fixture(autouse=True)
def _one_verifier(verifier: verifying.Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands share one process that verifies; each would take seconds to start its own."""

    @contextmanager
    def shared() -> Iterator[verifying.Verifier]:
        yield verifier

    monkeypatch.setattr("compress.verify.Verifier", shared)
    monkeypatch.setattr("compress.run.Verifier", shared)


@pytest.fixture
def compress(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """``compress("apply", path, "--out", out)`` as a shell would call it."""
    transformers.logging.disable_progress_bar()

    def called(*arguments: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        code = 0
        capfd.readouterr()
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        printed = capfd.readouterr()
        return Answer(code, printed.out, printed.err)

    return called


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """``recipe({"use": "rtn"}, model="demo")`` → a recipe file with these stages and keys."""

    def written(*stages: dict[str, Any], **keys: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"model": "demo", **keys, "stages": list(stages)}))
        return path

    return written


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    return Path(shutil.copytree(DEMO, tmp_path / "model"))
