"""``dense``: every weight expanded to a plain matrix, which any transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.checkpoint import RECORD, load, record
from compress.export.base import Exporter, run
from compress.stored import Stored
from compress.writer import Shards, copy_companions, model_card, sha256


class DenseExporter(Exporter):
    """An ordinary Hugging Face folder, written a block at a time.

    What the compressed folder says of itself (recipe, record, card) goes along, so that the
    result can be verified, evaluated and reported like it.
    """

    holds: ClassVar[dict[str, str]] = {
        "dense": "exactly",
        "sparse": "expanded: zeros are stored",
        "quantized": "expanded",
        "coded": "expanded",
        "lowrank": "expanded: factors are multiplied",
        "sum": "expanded: terms are added",
        "float8": "expanded",
        "int8": "expanded",
        "nf4": "expanded",
    }

    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="of all matrices; the model's own unless given"
    )

    def refusal(self, stored: Stored) -> str | None:
        return uneven(stored)

    def write(self, stored: Stored, out: Path) -> dict[str, Any]:
        out.mkdir()
        shards = Shards(out)
        for block in stored.anatomy.blocks:
            weights, others = stored.block(block)
            for site in block.sites:
                matrix = weights[site.name].dense().to(self._dtype or weights[site.name].dtype)
                shards.add(site.parameter, matrix.T if site.layout == "conv1d" else matrix)
            for name, tensor in others.items():
                shards.add(name, tensor)
        shards.close()
        config = stored.plain_config()
        if self.dtype:
            config["dtype"] = self.dtype
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(stored.folder, out)
        keep_record(stored.folder, out, "dense", "transformers")
        return {}

    @property
    def _dtype(self) -> torch.dtype | None:
        return getattr(torch, self.dtype) if self.dtype else None

    def logits(self, out: Path, tokens: Tensor) -> Tensor:
        return run(load(out, dtype=torch.float32), tokens)


def uneven(stored: Stored) -> str | None:
    """Why a model of layers of several shapes needs the modelling file."""
    shapes = getattr(stored.config, "compressed_shapes", None)
    if not shapes:
        return None
    return (
        f"{next(iter(shapes))} has a shape that no config of {stored.config.model_type} "
        "expresses; only the folder's own modelling file does"
    )


def keep_record(folder: Path, out: Path, storage: str, loads_with: str) -> None:
    """Recipe, record and card of a compressed folder, for another folder of the same model."""
    info = record(folder)
    if not info:
        return
    files = sorted(out.glob("*.safetensors"))
    info |= {"storage": storage, "loads_with": loads_with, "exported": storage}
    info["bytes"] = info["bytes"] | {"disk": sum(file.stat().st_size for file in files)}
    info["files"] = {file.name: sha256(file) for file in files}
    (out / RECORD).write_text(json.dumps(info, indent=1) + "\n")
    (out / "README.md").write_text(model_card(info))
    if (folder / "recipe.yaml").is_file():
        (out / "recipe.yaml").write_bytes((folder / "recipe.yaml").read_bytes())
