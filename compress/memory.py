"""Give freed memory back to the system.

The C library keeps freed memory for later, in pieces that large tensors of ever other sizes do not
fit into, so that a long walk over blocks would grow with every block though it frees each of them.
"""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return what is free to the system (glibc's malloc_trim; elsewhere nothing happens)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
