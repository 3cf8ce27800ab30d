"""How much memory there is, and giving back what was freed.

The C library keeps freed memory for later, in pieces that large tensors of ever other sizes do not
fit into, so that a long walk over blocks would grow with every block though it frees each of them.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import psutil


def give_back() -> None:
    """Return what is free to the system (glibc's malloc_trim)."""
    _glibc("malloc_trim", 0)


def map_large() -> None:
    """Have tensors from 1 MB on lie on pages of their own, which go back when they are freed.

    Left alone, glibc soon takes them from its heap, which then has holes that grow with every
    block. What smaller ones free stays at hand: or else each would ask for its pages anew.
    """
    _glibc("mallopt", -3, 1 << 20)  # M_MMAP_THRESHOLD
    _glibc("mallopt", -1, 1 << 26)  # M_TRIM_THRESHOLD


def keep_large() -> None:
    """Have tensors of up to 32 MB, the most there can be, lie on the heap, whose pages stay.

    Where a whole model runs or trains, each step needs what the one before it freed, and pages
    that come anew from the system each time take a fifth of the time and more.
    """
    _glibc("mallopt", -3, 1 << 25)
    _glibc("mallopt", -1, 1 << 30)


def _glibc(function: str, *arguments: int) -> None:
    """Call it where there is one; with other C libraries nothing happens."""
    try:
        ctypes.CDLL(None)[function](*arguments)
    except (AttributeError, OSError, TypeError):
        return


def available() -> int:
    """Bytes that this process may still take: what is free, or what its control group leaves."""
    own = psutil.Process().memory_info().rss
    free = min([psutil.virtual_memory().available, *(limit - own for limit in _limits())])
    return max(0, free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _limits() -> list[int]:
    """Of the control groups that this process is in, in versions 1 and 2 of their file system."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for _, kinds, path in (line.split(":", 2) for line in lines):
        if kinds not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", kinds)
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            for name in ("memory.max", "memory.limit_in_bytes"):
                try:
                    found.append(int((folder / name).read_text()))
                except (OSError, ValueError):  # none there, or "max"
                    continue
    return found
