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
ENCODER, DECODER = "encoder.onnx", "decoder.onnx"  # in its place for an encoder-decoder
DATA = f"{FILE}.data"  # the numbers of a folder's graphs
SMALL = 256  # bytes: constants up to that stay in the graph
CACHE, SHARED = "cache", "in place"  # in metadata: past and present may be one buffer
LOGITS_FROM = "logits_from"  # an input: the first token whose logits are wanted
ROOM = 256  # tokens by which the buffers of a cache grow


class Cache:
    """Keys and values of the ``length`` tokens read so far, layer by layer.

    values  OrtValues [batch, heads, room, width], of which ``length`` tokens are filled; a graph
            that does not write in place has no more room than that
    """

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.length = 0


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
        self.optional = [value.name for value in self.session.get_overridable_initializers()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.shared = metadata.get(CACHE) == SHARED

    def run(self, feeds: dict[str, Tensor], cache: Cache | None = None) -> Tensor:
        """The first output, float32; ``cache`` grows by what was read, and feeds of other names are
        passed over."""
        binding = self.session.io_binding()
        if self.past:
            batch, length = feeds["input_ids"].shape
            cache = cache or Cache()
            total = cache.length + length
            if self.shared and batch > 1 and total > length > 1:  # more than the node takes
                return torch.cat([self.run(one, cache) for one in _one_by_one(feeds, length)], 1)
            self._make_room(cache, batch, total)
            for name, value in zip(self.past, cache.values, strict=True):
                binding.bind_ortvalue_input(name, value)
        names = [*self.names, *(name for name in self.optional if name in feeds)]
        given = {name: self._value(np.ascontiguousarray(feeds[name].numpy())) for name in names}
        for name, value in given.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output(self.outputs[0], "cpu")
        for number, name in enumerate(self.outputs[1:]):
            if self.shared and cache:
                binding.bind_ortvalue_output(name, cache.values[number])
            else:
                binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        first, *rest = binding.get_outputs()
        if self.past and cache:
            cache.length = total
            if not self.shared:  # else its values own the memory that was written
                cache.values = rest
        return torch.from_numpy(first.numpy())

    def all(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every output of a graph without a cache, by its name."""
        found = self.session.run(None, {name: feeds[name].numpy() for name in self.names})
        return dict(zip(self.outputs, map(torch.from_numpy, found), strict=True))

    def _make_room(self, cache: Cache, batch: int, total: int) -> None:
        """Buffers with room for ``total`` tokens if they are written in place, else empty ones."""
        room = -(-total // ROOM) * ROOM if self.shared else 0
        if cache.values and (not self.shared or cache.values[0].shape()[2] >= room):
            return
        old, cache.values = cache.values, []  # held while their memory is read
        for number, value in enumerate(self.past.values()):
            new = np.zeros((batch, value.shape[1], room, value.shape[3]), np.float32)
            if old:
                new[:, :, : cache.length] = old[number].numpy()[:, :, : cache.length]
            cache.values.append(self._value(new))

    def _value(self, array: np.ndarray) -> Any:
        """An OrtValue of an array's memory, which it keeps."""
        return self.runtime.OrtValue.ortvalue_from_numpy(array)


def _one_by_one(feeds: dict[str, Tensor], length: int) -> Iterator[dict[str, Tensor]]:
    """Feeds of ``length`` tokens, a token at a time."""
    for last in range(1 - length, 1):
        end = last or None
        yield {
            name: value[:, :end] if name == "attention_mask" else value[:, last - 1 : end]
            for name, value in feeds.items()
            if value.dim() > 1
        }


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


def files(folder: Path) -> list[Path]:
    """The graphs of a folder: one, or an encoder's and a decoder's; empty if there are none."""
    found = [folder / FILE] if (folder / FILE).is_file() else [folder / ENCODER, folder / DECODER]
    return [file for file in found if file.is_file()]


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
        return session.run(text_feeds(tokens))
    return session.run({session.names[0]: tokens})
