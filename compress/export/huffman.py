"""``huffman``: the same integers in fewer bytes, each in as many bits as its frequency asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from compress.anatomy import Site
from compress.export.base import Exporter
from compress.export.writing import write_folder
from compress.formats import ModellingFile
from compress.stored import Stored
from compress.weights import Huffman, Quantized, Weight


class HuffmanExporter(Exporter):
    """The smallest file of a packed checkpoint, to keep or to send: nothing is lost.

    Loading decodes a matrix when it is first read. ``--to transformers`` (or another format) turns
    the folder back. Where a code is not shorter the weight stays packed.
    """

    needs: ClassVar[str] = ModellingFile.needs
    rounds_inputs: ClassVar[bool] = True
    holds: ClassVar[dict[str, str]] = {
        "dense": "exactly",
        "sparse": "exactly",
        "quantized": "exactly",
        "coded": "exactly",
        "lowrank": "exactly",
        "sum": "exactly",
        "float8": "exactly",
        "int8": "exactly",
        "nf4": "exactly",
    }

    def refusal(self, stored: Stored) -> str | None:
        if not any(spec["kind"] == "quantized" for spec in stored.specs.values()):
            return "it has no integers on a grid, the weights that get smaller so"
        return None

    def write(self, stored: Stored, out: Path) -> dict[str, Any]:
        def weight(site: Site) -> Weight:
            plain = stored.weight(site)
            if not isinstance(plain, Quantized):
                return plain
            return min(plain, Huffman.of(plain), key=lambda made: made.nbytes)

        specs = {site.name: weight(site).spec for site in stored.anatomy.sites}
        how = ModellingFile(stored.anatomy, specs, stored.model_class, stored.config)
        write_folder(stored, out, how, weight)
        return {}
