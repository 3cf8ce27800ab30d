"""``onnx``: a folder for onnxruntime, whose CPU kernels compute with our integers as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from compress.export import onnx_session
from compress.export.base import Exporter, required
from compress.export.onnx_trace import filled, traced
from compress.stored import Stored
from compress.writer import copy_companions

DATA = f"{onnx_session.FILE}.data"


class OnnxExporter(Exporter):
    """``model.onnx`` and beside it ``model.onnx.data``, config.json, tokenizer and the like.

    Decoders have a cache: past_key_values.<layer>.key and .value in, present.<layer>.* out; batch
    and lengths are free. Integers on a grid become MatMulNBits (onnx_blocks.py), of a packed table
    GatherBlockQuantized; plain matrices keep their dtype, and all is computed in float32.
    """

    needs: ClassVar[str] = "onnxruntime, with onnx and onnxscript to write"
    holds: ClassVar[dict[str, str]] = {
        "dense": "exactly",
        "sparse": "expanded: zeros are stored",
        "quantized": "exactly: in groups of a multiple of 16; else expanded",
        "coded": "expanded",
        "lowrank": "exactly: two products, each factor as its kind is held",
        "sum": "exactly: terms are computed apart, each as its kind is held",
        "float8": "expanded",
        "int8": "exactly",
        "nf4": "expanded",
    }

    int8_activations: bool = Field(
        True,
        description="packed matrices round what they read to 8 bits, a block at a time, as the "
        "fast kernels do",
    )

    def refusal(self, stored: Stored) -> str | None:
        if stored.config.is_encoder_decoder:
            return f"{stored.config.model_type} has an encoder and a decoder; one graph is written"
        return None

    def write(self, stored: Stored, out: Path) -> dict[str, Any]:
        required("onnx", "onnx")
        ir = required("onnx_ir", "onnx")
        model, held = filled(stored, level=4 if self.int8_activations else 0)
        program = traced(model, str(stored.folder))
        out.mkdir()
        ir.save(program, str(out / onnx_session.FILE), external_data=DATA)
        config = stored.plain_config()
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(stored.folder, out)
        return {"held": held}

    def logits(self, out: Path, tokens: Tensor) -> Tensor:
        """By the kernels that round nothing, whatever the option says."""
        with onnx_session.unrounded(out / onnx_session.FILE) as file:
            return onnx_session.logits(file, tokens)

    def other_logits(self, out: Path, tokens: Tensor) -> dict[str, Tensor]:
        if not self.int8_activations:
            return {}
        return {"8-bit activations": onnx_session.logits(out / onnx_session.FILE, tokens)}
