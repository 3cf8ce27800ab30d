"""``bitsandbytes``: NF4 or int8 modules, as transformers loads them with bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.anatomy import Site
from compress.checkpoint import load
from compress.errors import CheckpointError
from compress.export.base import Exporter, Held, run
from compress.export.dense import keep_record, uneven
from compress.formats import BitsAndBytes
from compress.stored import Stored
from compress.weights import NF4, Dense, Int8, Weight
from compress.writer import Shards, copy_companions

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
        out.mkdir()
        shards = Shards(out)
        held: dict[str, Held] = {}
        for block in stored.anatomy.blocks:
            for site in block.sites:
                before, weight = stored.weight(site), self._made(stored, site, taken)
                again: Held = "expanded" if weight.kind == "dense" else "rounded again"
                held[site.name] = "exactly" if weight.kind == before.kind else again
                for name, tensor in how.tensors(site, weight).items():
                    shards.add(name, tensor)
            inside = {site.parameter for site in block.sites}
            for name in block.tensors:
                if name not in inside:
                    shards.add(name, stored.tensor(name))
        shards.close()
        config = stored.plain_config()
        how.configure(config, {})
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(stored.folder, out)
        keep_record(stored.folder, out, "bitsandbytes", self.needs)
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

    def logits(self, out: Path, tokens: Tensor) -> Tensor:
        return run(load(out, dtype=torch.float32), tokens)
