"""What a run tells whoever watches it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

Outcome = TypeVar("Outcome")


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


def outcome(events: Generator[Any, None, Outcome]) -> Outcome:
    """What work comes to whose events nobody watches."""
    while True:
        try:
            next(events)
        except StopIteration as stop:
            return stop.value
