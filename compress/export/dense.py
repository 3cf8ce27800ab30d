"""``dense``: every weight expanded to a plain matrix, which any transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from compress.anatomy import Site
from compress.export.base import Exporter
from compress.export.writing import uneven, write_folder
from compress.formats import DenseFormat
from compress.stored import Stored
from compress.weights import Dense, Weight


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
        def weight(site: Site) -> Weight:
            found = stored.weight(site)
            return Dense.of(found.dense().to(self._dtype or found.dtype))

        how = DenseFormat(stored.anatomy, stored.specs, stored.model_class, stored.config)
        changes = {"dtype": self.dtype} if self.dtype else {}
        write_folder(stored, out, how, weight, **changes)
        return {}

    @property
    def _dtype(self) -> torch.dtype | None:
        return getattr(torch, self.dtype) if self.dtype else None
