"""An exported ONNX folder in onnxruntime: what it reads, what it puts out, and its cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import CheckpointError, first_line
from compress.export.base import required

FILE = "model.onnx"
Cache = list[Any]  # onnxruntime's: keys and values of layers, [batch, heads, past, width]


class Session:
    """``model.onnx`` opened on the CPU, with as many threads as torch has unless told.

    Raises:
        CheckpointError: onnxruntime is not installed, or does not take the file.
    """

    def __init__(self, file: Path, threads: int | None = None) -> None:
        self.runtime = required("onnxruntime", "onnx")
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self.session = self.runtime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise CheckpointError(
                f"{file}: onnxruntime {self.runtime.__version__} does not load it: "
                f"{first_line(error, 200)}"
            ) from error
        inputs = {value.name: value for value in self.session.get_inputs()}
        self.past = {n: v for n, v in inputs.items() if n.startswith("past_key_values.")}
        self.names = [name for name in inputs if name not in self.past]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def run(self, feeds: dict[str, Tensor], cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """The first output, float32, and the cache with what was read; feeds of other names are
        passed over."""
        binding = self.session.io_binding()
        arrays = {name: np.ascontiguousarray(feeds[name].numpy()) for name in self.names}
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        if not cache:
            cache = self._no_past(len(next(iter(arrays.values()))))
        for name, value in zip(self.past, cache, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        first, *rest = binding.get_outputs()
        return torch.from_numpy(first.numpy()), rest if self.past else []

    def _no_past(self, batch: int) -> Cache:
        return [
            self.runtime.OrtValue.ortvalue_from_numpy(
                np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
            )
            for value in self.past.values()
        ]


def positions(mask: Tensor, length: int) -> Tensor:
    """int64 [batch, length]: where the last ``length`` tokens of a mask [batch, total] stand."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def text_feeds(tokens: Tensor, mask: Tensor | None = None, past: int = 0) -> dict[str, Tensor]:
    """All inputs that a text model may have, for ``tokens`` int64 [batch, length]."""
    batch, length = tokens.shape
    if mask is None:
        mask = torch.ones(batch, past + length, dtype=torch.int64)
    return {
        "input_ids": tokens,
        "attention_mask": mask.long(),
        "token_type_ids": torch.zeros_like(tokens),
        "position_ids": positions(mask, length),
    }


@contextmanager
def unrounded(file: Path) -> Iterator[Path]:
    """The same model with kernels that round nothing that they read; gone afterwards."""
    onnx = required("onnx", "onnx")
    proto = onnx.load(file, load_external_data=False)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    with NamedTemporaryFile(dir=file.parent, suffix=file.suffix) as copy:  # beside its data
        copy.write(proto.SerializeToString())
        copy.flush()
        yield Path(copy.name)


def logits(file: Path, tokens: Tensor) -> Tensor:
    """What the model in ``file`` makes of ``tokens``, or of images or audio in their place."""
    session = Session(file)
    if "input_ids" in session.names:
        return session.run(text_feeds(tokens))[0]
    return session.run({session.names[0]: tokens})[0]
