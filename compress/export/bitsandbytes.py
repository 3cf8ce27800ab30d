"""``bitsandbytes``: NF4 or int8 modules, as transformers loads them with bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from compress.anatomy import Site
from compress.errors import CheckpointError
from compress.export.base import Exporter, Held
from compress.export.writing import uneven, write_folder
from compress.formats import BitsAndBytes
from compress.stored import Stored
from compress.weights import NF4, Dense, Int8, Weight

BLOCK = 64  # weights that share a scale, as bitsandbytes has it by default


class BitsAndBytesExporter(Exporter):
    """What is compressed, or in a dense model every Linear of its blocks, rounded to ``kind``.

    Weights of that kind already stay as they are.
    """

    needs: ClassVar[str] = "transformers with bitsandbytes"
    holds: ClassVar[dict[str, str]] = {
        "dense": "rounded again: in a model that is all dense; else exactly",
        "sparse": "rounded again",
        "quantized": "rounded again",
        "coded": "rounded again",
        "lowrank": "rounded again",
        "sum": "rounded again",
        "float8": "rounded again",
        "int8": "exactly: when rounded to int8",
        "nf4": "exactly: when rounded to nf4",
    }

    kind: Literal["nf4", "int8"] = Field("nf4", description="the type of bitsandbytes")

    def refusal(self, stored: Stored) -> str | None:
        taken = self._taken(stored)
        if not taken:
            return "it has no Linear module in its blocks; bitsandbytes takes nothing else"
        return uneven(stored)

    def write(self, stored: Stored, out: Path) -> dict[str, Any]:
        taken = self._taken(stored)
        specs = {s.name: self._made(stored, s, taken).spec for s in stored.anatomy.sites}
        how = BitsAndBytes(stored.anatomy, specs, stored.model_class, stored.config)
        if reason := how.refusal():
            raise CheckpointError(f"{stored.folder}: bitsandbytes cannot hold it: {reason}")
        held: dict[str, Held] = {}

        def weight(site: Site) -> Weight:
            before, made = stored.specs[site.name]["kind"], self._made(stored, site, taken)
            again: Held = "expanded" if made.kind == "dense" else "rounded again"
            held[site.name] = "exactly" if made.kind == before else again
            return made

        write_folder(stored, out, how, weight)
        return {"held": held}

    def _taken(self, stored: Stored) -> set[str]:
        """Names of the sites that become modules of bitsandbytes."""
        inside = [s for s in stored.anatomy.sites if s.layout == "linear" and s.block is not None]
        packed = {s.name for s in inside if stored.specs[s.name]["kind"] != "dense"}
        return packed or {site.name for site in inside}

    def _made(self, stored: Stored, site: Site, taken: set[str]) -> Weight:
        weight = stored.weight(site)
        if weight.kind == self.kind and site.name in taken:
            return weight
        matrix = weight.dense()
        if site.name not in taken:
            return Dense.of(matrix.to(weight.dtype))
        if self.kind == "int8":
            return Int8.of(matrix, weight.dtype)
        return NF4.of(matrix, weight.dtype, block=BLOCK, double_quant=False)
