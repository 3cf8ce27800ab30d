"""How much a checkpoint weighs on disk. No weights are loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from compress import checkpoint, gguf_file
from compress.errors import CheckpointError, NotMeasurable
from eval.metrics.base import Context, Metric, read_config
from eval.results import Result


class SizeBytes(Metric):
    """Bytes of the folder's safetensors files, adapters included, or of its GGUF or ONNX files."""

    name = "size_bytes"
    unit = "bytes"
    higher_is_better = False

    def measure(self, context: Context) -> Result:
        return self.result(context, size_bytes(context.path))


class BitsPerParam(Metric):
    """Bits on disk for each parameter of the dense original, embeddings and head counted."""

    name = "bits_per_param"
    unit = "bits/parameter"
    higher_is_better = False
    beside_original = True

    def measure(self, context: Context) -> Result:
        count = parameters(context)
        detail = {"parameters": count}
        return self.result(context, 8 * size_bytes(context.path) / count, detail=detail)


def size_bytes(folder: Path) -> int:
    """Bytes on disk of the folder's weights.

    Raises:
        CheckpointError: there are none.
    """
    files = checkpoint.weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder}: no .safetensors file; save the weights as safetensors")
    return sum(file.stat().st_size for file in files)


def parameters(context: Context) -> int:
    """Parameters of the dense original, tied ones once.

    Taken from the checkpoint's own record; without one, from the headers of the original's files.

    Raises:
        NotMeasurable: the checkpoint is quantized and does not say what it was made from.
    """
    record = checkpoint.record(context.path)
    count = record.get("base", {}).get("parameters")
    if isinstance(count, int):
        return count
    if context.original is not None:
        return count_parameters(checkpoint.resolve(context.original))
    if record or "quantization_config" in context.config:
        raise NotMeasurable(
            f"{context.folder}: the parameters of the dense original are not known; "
            "name it with --baseline"
        )
    return count_parameters(context.path)


def count_parameters(folder: Path) -> int:
    """Parameters of a dense checkpoint, from the headers of its files.

    Buffers that some checkpoints store are left out: whole numbers, rotary frequencies, and the
    causal masks of GPT-2 and GPT-NeoX, which are named like biases but have four dimensions.
    """
    packed = gguf_file.find(folder)
    if packed is not None:
        return gguf_file.tensors(packed).total()
    tied = read_config(folder).get("tie_word_embeddings") is True
    tensors: dict[str, Any] = {}
    for file in checkpoint.weight_files(folder):
        tensors |= header(file)
    count = 0
    for name, entry in tensors.items():
        shape = entry["shape"]
        buffer = name.endswith(("inv_freq", "masked_bias")) or (
            name.endswith(".bias") and len(shape) == 4
        )
        twice = tied and name == "lm_head.weight"
        if entry["dtype"].startswith(("F", "BF")) and not buffer and not twice:
            count += math.prod(shape)
    return count


def header(file: Path) -> dict[str, Any]:
    """Name → {dtype, shape, data_offsets} of a safetensors file.

    The format (https://huggingface.co/docs/safetensors): eight bytes, little-endian, hold the
    length of the JSON that follows.
    """
    with file.open("rb") as stream:
        text = stream.read(int.from_bytes(stream.read(8), "little"))
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file}: not a safetensors file; copy or save it again") from error
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}
