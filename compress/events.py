"""What a run tells whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something a progress display can show: a step of ``label`` is done.

    ``numbers`` holds seconds, losses and the like; the last event's ``result`` is the record.
    """

    label: str
    done: int = 0
    total: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    result: dict[str, Any] | None = None
