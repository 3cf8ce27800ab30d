"""Work in progress on disk: one safetensors file a block, written whole or not at all.

A stage reads the blocks the stage before it wrote and writes its own; what is there is done. The
final checkpoint is streamed from the last stage's blocks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from compress.errors import CheckpointError
from compress.weights import Weight


@dataclass
class Part:
    """One block: the weight of every site, the other tensors, and the records of its stages."""

    weights: dict[str, Weight]
    others: dict[str, Tensor]
    records: list[dict[str, Any]] = field(default_factory=list)


class Blocks(Protocol):
    """Where the blocks of a model are read: the original's files, or a stage's ``Store``."""

    def read(self, number: int) -> Part: ...

    def header(self, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The weights' specs and the records of a block."""
        ...


class Store:
    """The blocks after one stage, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, number: int) -> Path:
        return self.folder / f"block-{number:04d}.safetensors"

    def has(self, number: int) -> bool:
        return self.path(number).exists()

    def write(self, number: int, part: Part) -> None:
        """Write block ``number`` atomically."""
        specs = {name: weight.spec for name, weight in part.weights.items()}
        tensors = {
            f"{name}:{key}": tensor
            for name, weight in part.weights.items()
            for key, tensor in weight.tensors.items()
        } | part.others
        self.folder.mkdir(parents=True, exist_ok=True)
        header = json.dumps({"specs": specs, "records": part.records})
        save_tensors(self.path(number), tensors, {"part": header})

    def read(self, number: int) -> Part:
        specs, records = self.header(number)
        with safe_open(self.path(number), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        weights = {}
        for name, spec in specs.items():
            own = {
                k.partition(":")[2]: t
                for k, t in tensors.items()
                if k.partition(":")[0] == name and ":" in k
            }
            weights[name] = Weight.restore(spec, own)
        others = {key: tensor for key, tensor in tensors.items() if ":" not in key}
        return Part(weights, others, records)

    def header(self, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The weights' specs and the records of a block, without its tensors."""
        with safe_open(self.path(number), framework="pt") as file:
            header = json.loads(file.metadata()["part"])
        return header["specs"], header["records"]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class SafetensorsWriter:
    """A safetensors file written tensor by tensor, so that memory holds one at a time.

    Tensors gather in a side file; ``close`` writes the header and copies them behind it, wide
    dtypes first, as the format's own library orders them, so that all are aligned. The file
    appears under its name only when it is whole. Equal tensors give equal bytes.
    """

    def __init__(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        self.path = path
        self.metadata = metadata or {"format": "pt"}
        self._entries: list[tuple[str, str, list[int], int, int, int]] = []
        self._side = path.with_name(path.name + ".data")
        self._stream = self._side.open("wb")
        self.nbytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        whole = tensor.detach().cpu().contiguous()
        # A tensor of one entry may have any stride, and view() wants 1.
        flat = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)
        size = flat.numel()
        self._entries.append(
            (
                name,
                _NAMES[tensor.dtype],
                list(tensor.shape),
                self.nbytes,
                size,
                tensor.dtype.itemsize,
            )
        )
        self._stream.write(flat.numpy().data)
        self.nbytes += size

    def close(self) -> None:
        self._stream.close()
        self._entries.sort(key=lambda e: (-e[5], e[0]))
        header = _header([(n, d, s, size) for n, d, s, _, size, _ in self._entries], self.metadata)
        draft = self.path.with_name(self.path.name + ".draft")
        with draft.open("wb") as out, self._side.open("rb") as side:
            out.write(header)
            for _, _, _, start, size, _ in self._entries:
                side.seek(start)
                while size:
                    chunk = side.read(min(size, 1 << 22))
                    if not chunk:
                        raise CheckpointError(f"{self._side}: ends too early; is the disk full?")
                    out.write(chunk)
                    size -= len(chunk)
            out.flush()
            os.fsync(out.fileno())
        draft.replace(self.path)
        self._side.unlink()


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file of what is in memory already, whole or not at all."""
    writer = SafetensorsWriter(path, metadata)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()


def _header(entries: Iterable[tuple[str, str, list[int], int]], metadata: dict[str, str]) -> bytes:
    """What stands before the tensors: (name, dtype, shape, bytes) of each, in their order."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, dtype, shape, size in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a safetensors file of these tensors, which may be on the meta device."""
    found = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    entries = [
        (name, _NAMES[t.dtype], list(t.shape), t.numel() * t.dtype.itemsize) for name, t in found
    ]
    return len(_header(entries, {"format": "pt"})) + sum(size for *_, size in entries)


_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
          torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.bool: "BOOL"}  # fmt: skip
