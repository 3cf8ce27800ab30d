"""``onnx``: a folder for onnxruntime, whose CPU kernels compute with our integers as they are."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor
from transformers import AutoConfig

from compress.export import onnx_pair, onnx_session
from compress.export.base import Exporter, required
from compress.export.onnx_trace import filled, traced
from compress.export.writing import keep_record
from compress.plain_load import make_inputs
from compress.stored import Stored
from compress.verify import written_inputs
from compress.writer import copy_companions


class OnnxExporter(Exporter):
    """``model.onnx`` and beside it ``model.onnx.data``, config.json, tokenizer and the like; of an
    encoder-decoder ``encoder.onnx`` and ``decoder.onnx`` (onnx_pair.py).

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
        cls = stored.model_class
        if stored.config.is_encoder_decoder and not cls.can_generate():
            return f"{cls.__name__} has an encoder and a decoder, and writes no text"
        return None

    def write(self, stored: Stored, out: Path) -> dict[str, Any]:
        for package in ("onnx", "onnxscript"):
            required(package, "onnx")
        ir = required("onnx_ir", "onnx")
        model, held = filled(stored, level=4 if self.int8_activations else 0)
        if stored.config.is_encoder_decoder:
            programs = onnx_pair.traced(model, str(stored.folder))
            out.mkdir()
            onnx_pair.save(programs, out)
        else:
            program = traced(model, str(stored.folder))
            out.mkdir()
            ir.save(program, str(out / onnx_session.FILE), external_data=onnx_session.DATA)
        config = stored.plain_config()
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(stored.folder, out)
        keep_record(stored.folder, out, self.name, self.needs)
        return {"held": held}

    def logits(self, out: Path, tokens: Tensor) -> Tensor:
        """By the kernels that round nothing, whatever the option says."""
        with ExitStack() as copies:
            files = [
                copies.enter_context(onnx_session.unrounded(file))
                for file in onnx_session.files(out)
            ]
            return _logits(out, files, tokens)

    def other_logits(self, out: Path, tokens: Tensor) -> dict[str, Tensor]:
        if not self.int8_activations:
            return {}
        return {"8-bit activations": _logits(out, onnx_session.files(out), tokens)}


def _logits(out: Path, files: list[Path], tokens: Tensor) -> Tensor:
    if len(files) == 1:
        return onnx_session.logits(files[0], tokens)
    written = make_inputs(written_inputs(AutoConfig.from_pretrained(out)))
    return onnx_pair.logits(files[0], files[1], tokens, written["decoder_input_ids"])
