"""``transformers``: the folder itself, if plain transformers loads it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

from compress.export.base import Exporter
from compress.export.writing import write_folder
from compress.formats import Format, ModellingFile, choose
from compress.stored import Stored


class TransformersExporter(Exporter):
    """A folder that plain transformers loads: a copy, or what a modelling file held, written anew.

    Weights that only a modelling file can hold are refused: other programs do not run it.
    """

    rounds_inputs: ClassVar[bool] = True
    holds: ClassVar[dict[str, str]] = {
        "dense": "exactly",
        "sparse": "exactly: zeros are stored",
        "quantized": "exactly",
        "sum": "exactly: as an adapter of peft",
        "float8": "exactly",
        "int8": "exactly",
        "nf4": "exactly",
    }

    def refusal(self, stored: Stored) -> str | None:
        if not hasattr(stored.config, "compressed_sites"):
            return None
        how = self._format(stored)
        if isinstance(how, ModellingFile) or how.adapter:
            return "only the folder's own modelling file reads it; dense, gguf or onnx may do"
        return None

    def write(self, stored: Stored, out: Path) -> dict[str, Any]:
        if hasattr(stored.config, "compressed_sites"):
            write_folder(stored, out, self._format(stored), stored.weight)
        else:
            shutil.copytree(stored.folder, out)
        return {}

    def _format(self, stored: Stored) -> Format:
        """The plainest that holds the weights as they are."""
        return choose(
            stored.anatomy, stored.specs, stored.model_class, stored.config, storage="dense"
        )
