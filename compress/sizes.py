"""How large something may be, and how long it may take, as people write it."""

from __future__ import annotations

import math
import re

from compress.errors import RecipeError

UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
TIMES = {"s": 1, "min": 60, "h": 3600}
PLANS = 1000  # of which no time allows more


def parse_size(size: str, whole: float) -> int:
    """``30%`` of ``whole``, ``500KB``, ``1.5MiB`` or plain bytes, as bytes.

    Raises:
        RecipeError: it is none of these, or nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-z]*)\s*", size.lower())
    if not found or (found[2] != "%" and found[2] not in UNITS):
        raise RecipeError(f"size {size}: write a share or bytes, e.g. 30% or 500KB")
    budget = int(float(found[1]) * (whole / 100 if found[2] == "%" else UNITS[found[2]]))
    if budget < 1:
        raise RecipeError(f"size {size} is nothing")
    return budget


def parse_share(share: str) -> float:
    """``99%`` or ``0.99`` as 0.99.

    Raises:
        RecipeError: it is no share between 0 and 1.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", share)
    value = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    if not 0 < value < 1:
        raise RecipeError(f"keep {share}: write a share of the quality below 100%, e.g. 99%")
    return value


def parse_effort(effort: str) -> tuple[int, float]:
    """``6`` plans, or as many as ``90s``, ``10min`` or ``1.5h`` allow: how many, within seconds.

    Raises:
        RecipeError: it is neither.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|)\s*", effort.lower())
    if not found or (not found[2] and "." in found[1]):
        raise RecipeError(f"effort {effort}: a number of plans, or a time, e.g. 6 or 10min")
    return (PLANS, float(found[1]) * TIMES[found[2]]) if found[2] else (int(found[1]), math.inf)
