"""What other toolkits make of a size: llama.cpp by its mixed types, auto-round by its scheme.

Both leave something as it is that takes a part of a small model's bytes: auto-round the tables,
llama.cpp rows that its blocks of 256 do not divide, for which it takes larger types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compress.anatomy import select
from compress.errors import CompressError
from compress.export import llama
from compress.export.export import export
from compress.source import Source
from eval.peers.environment import HOME
from eval.peers.jobs import Job, Method, Setting, Text
from eval.peers.measure import nll, run

MIXED = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")
TRIES = 4


@dataclass(frozen=True)
class Reached:
    """``nll`` of the windows of evaluation text."""

    setting: str
    bytes: int
    nll: list[float]


def mixed_types(model: str, data: str, size: int, folder: Path) -> Reached:
    """The largest of llama.cpp's mixed types that fits.

    Raises:
        CompressError: none does, or llama.cpp does not know the architecture.
    """
    dense, found = folder / "dense.gguf", {}
    export(model, "gguf", dense)
    for kind in MIXED:
        llama.quantized(dense, folder / f"{kind}.gguf", kind)
        found[kind] = (folder / f"{kind}.gguf").stat().st_size
    fits = {kind: bytes for kind, bytes in found.items() if bytes <= size}
    if not fits:
        raise CompressError(f"the smallest, {min(found, key=found.__getitem__)}, has "
                            f"{min(found.values()):,} bytes")  # fmt: skip
    kind = max(fits, key=fits.__getitem__)
    return Reached(kind, fits[kind], nll(str(folder / f"{kind}.gguf"), Text(data)))


def automatic_scheme(model: str, data: str, size: int, folder: Path) -> Reached:
    """auto-round's AutoScheme for the bits that are left, of 2, 3, 4 and 8 in groups of 64.

    Raises:
        CompressError: it has no scheme for so few bits, or fails.
    """
    source = Source(model)
    anatomy = source.anatomy
    blocks = select(anatomy.sites, ["blocks"], [], None, anatomy.layers)
    weights = sum(site.shape[0] * site.shape[1] for site in blocks)
    bits = 8 * (size - source.nbytes + sum(site.nbytes for site in blocks)) / weights
    for _ in range(TRIES):
        method = Method("auto-round", "automatic", "auto-round", {"iters": 200, "avg_bits": bits})
        row = run(Job(method, Setting(4, 64), 0, model, Text(data)), HOME)
        if row.error:
            raise CompressError(f"{bits:.2f} bits: {row.error}")
        if row.bytes <= size:
            return Reached(f"{bits:.2f} bits", row.bytes, row.samples)
        bits -= 8 * (row.bytes - size) / weights + 0.01
    raise CompressError(f"{bits:.2f} bits: {row.bytes:,} bytes")


PEERS: dict[str, Callable[[str, str, int, Path], Reached]] = {
    "llama.cpp": mixed_types, "auto-round": automatic_scheme,
}  # fmt: skip
