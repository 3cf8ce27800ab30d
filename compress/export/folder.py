"""``transformers``: the folder itself, if plain transformers loads it; says whether vLLM does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

from compress.export.base import Exporter
from compress.export.writing import write_folder
from compress.formats import Format, ModellingFile, choose
from compress.stored import Stored

# vllm/model_executor/layers/quantization/compressed_tensors: what its kernels take
VLLM_BITS, VLLM_GROUPS = (4, 8), (32, 64, 128)


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
            return {"vllm": vllm(Stored(out)) or "reads it"}
        shutil.copytree(stored.folder, out)
        return {"vllm": vllm(stored) or "reads it"}

    def _format(self, stored: Stored) -> Format:
        """The plainest that holds the weights as they are."""
        return choose(
            stored.anatomy, stored.specs, stored.model_class, stored.config, storage="dense"
        )


def vllm(stored: Stored) -> str | None:
    """Why vLLM's loader of compressed-tensors would not take the folder; None when it would.

    By what its configuration classes read: groups of settings that parse, and of every packed
    matrix its codes, scales and shape.

    Raises:
        ValueError: ``quantization_config`` is not one of compressed-tensors.
    """
    said = stored.quantization
    if said.get("quant_method") != "compressed-tensors":
        return None
    from compressed_tensors.quantization import QuantizationConfig

    QuantizationConfig.model_validate(said)
    for site in stored.anatomy.sites:
        spec = stored.specs[site.name]
        if spec["kind"] != "quantized" or "activations" in spec:
            continue
        bits, group, columns = spec["bits"], spec["group"], spec["shape"][1]
        if site.layout != "linear" or site.block is None:
            return f"it does not run packed embeddings and heads ({site.name})"
        if bits not in VLLM_BITS:
            return f"it has no kernel for weights of {bits} bits ({site.name})"
        if group not in (*VLLM_GROUPS, columns):
            return f"its kernels take groups of 32, 64 and 128 or rows, not {group} ({site.name})"
    return None
