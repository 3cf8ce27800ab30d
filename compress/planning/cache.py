"""What planning has found out, kept for the next plan: one JSON file for model, text, settings."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from compress.workdir import user_cache


def cache_folder() -> Path:
    """Where plans keep what they find out."""
    return user_cache() / "plans"


def digest(what: Any) -> str:
    """16 hex digits of what can stand in JSON."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


class Cache:
    """Costs by site and option, and measured KL by stage; written after each, atomically.

    Without a folder it lasts as long as the process.
    """

    def __init__(self, folder: Path | None, key: Any) -> None:
        self.path = folder / f"{digest(key)}.json" if folder else None
        self.costs: dict[str, dict[str, float]] = {}
        self.measured: dict[str, list[float]] = {}
        if self.path and self.path.exists():
            kept = json.loads(self.path.read_text())
            self.costs, self.measured = kept["costs"], kept["measured"]

    def keep(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps({"costs": self.costs, "measured": self.measured}))
            draft.replace(self.path)
