"""``transformers``: the folder itself, if plain transformers loads it; says whether vLLM does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.anatomy import Site
from compress.checkpoint import load
from compress.export.base import Exporter, run
from compress.export.dense import keep_record
from compress.formats import Format, ModellingFile, Shapes, choose, shapes_of
from compress.stored import Stored
from compress.weights import Weight
from compress.writer import Shards, copy_companions


def write_folder(stored: Stored, out: Path, how: Format, weight: Callable[[Site], Weight]) -> None:
    """A model folder in one of the formats of ``formats.py``, block by block."""
    out.mkdir()
    shards = Shards(out)
    shapes: Shapes = {}
    for block in stored.anatomy.blocks:
        for site in block.sites:
            made = weight(site)
            shapes[site.name] = shapes_of(made)
            for name, tensor in how.tensors(site, made).items():
                shards.add(name, tensor)
        inside = {site.parameter for site in block.sites}
        for name in block.tensors:
            if name not in inside:
                shards.add(name, stored.tensor(name))
    shards.close()
    config = stored.plain_config()
    how.configure(config, shapes)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_companions(stored.folder, out)
    how.write_files(out)
    keep_record(stored.folder, out, how.name, how.needs)


# vllm/model_executor/layers/quantization/compressed_tensors: what its kernels take
VLLM_BITS, VLLM_GROUPS = (4, 8), (32, 64, 128)


class TransformersExporter(Exporter):
    """A folder that plain transformers loads: a copy, or what a modelling file held, written anew.

    Weights that only a modelling file can hold are refused: other programs do not run it.
    """

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

    def logits(self, out: Path, tokens: Tensor) -> Tensor:
        return run(load(out, dtype=torch.float32), tokens)


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
