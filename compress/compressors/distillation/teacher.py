"""What the original predicts: asked anew for every step, or kept on disk once for all.

``fetch`` gives what is known of the tokens that count, as tensors [tokens, …]; ``compare`` makes
of it, and of the student's logits for the same tokens, two distributions over the same classes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compress import distributed
from compress.compressors.distillation.losses import bucketed, log_probabilities
from compress.compressors.distillation.predictor import Batch, Predictor
from compress.objective import IGNORED, Examples
from compress.store import SafetensorsWriter

BLOCK = 32  # windows in a file of the cache
PIECE = 1 << 25  # logits in memory at once, in float32
Known = tuple[Tensor, ...]


class Teacher(Protocol):
    """See the module."""

    def fetch(self, batch: Batch, rows: Tensor) -> Known: ...

    def compare(self, logits: Tensor, temperature: float, *known: Tensor) -> tuple[Tensor, Tensor]:
        """log p of the teacher and log q of the student, float32 [tokens, classes]."""
        ...


class Online:
    """The model itself, in memory."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.predictor = Predictor(model, batch)
        self.output: Any = None  # of the last batch, where features are asked for
        self.features: dict[str, bool] = {}

    def fetch(self, batch: Batch, rows: Tensor) -> Known:
        with torch.no_grad():
            states, self.output = self.predictor.run(batch, **self.features)
            return (states[batch.labels != IGNORED],)

    def compare(self, logits: Tensor, temperature: float, *known: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            theirs = self.predictor.logits(known[0])
        shared = min(theirs.shape[-1], logits.shape[-1])  # tables may be padded differently
        p, q = (log_probabilities(x[..., :shared] / temperature) for x in (theirs, logits))
        return p, q


class Cached:
    """The ``top`` most likely tokens of every position, and the probability of all others.

    ids int32 and log p float16 [tokens that count, top], others float32 [tokens that count], in
    files of ``BLOCK`` windows. A file appears when it is whole, so a killed run goes on; the
    folder is named after the teacher and the text, so that another run finds it.
    """

    def __init__(self, folder: Path, text: Examples, temperatures: list[float]) -> None:
        self.folder, self.text, self.temperatures = folder, text, temperatures

    @staticmethod
    def key(teacher: str, text: Examples, top: int, temperatures: list[float]) -> str:
        """Folder name of what ``teacher`` (a hash) predicts of ``text``."""
        assert text.targets is not None
        digest = hashlib.sha256(json.dumps([teacher, top, temperatures, BLOCK]).encode())
        for tensor in (*text.inputs.values(), text.targets):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def missing(self) -> list[int]:
        blocks = range(math.ceil(len(self.text) / BLOCK))
        return [number for number in blocks if not self._path(number).exists()]

    def fill(self, teacher: Online, top: int, report: Callable[[int, int], None]) -> None:
        """Ask the teacher for what is missing; several processes share the work."""
        todo = self.missing()
        self.folder.mkdir(parents=True, exist_ok=True)
        device = next(teacher.predictor.model.parameters()).device
        for done, number in enumerate(todo[distributed.rank() :: distributed.size()], start=1):
            writer = SafetensorsWriter(self._path(number))
            for row in range(number * BLOCK, min((number + 1) * BLOCK, len(self.text))):
                rows = torch.tensor([row])
                known = teacher.fetch(read(self.text, rows, device), rows)[0]
                with torch.no_grad():
                    logits = teacher.predictor.logits(known).float()
                for name, tensor in self._kept(logits / self.temperatures[row], top).items():
                    writer.add(f"{row}.{name}", tensor)
            writer.close()
            report(min(len(todo), done * distributed.size()), len(todo))

    @staticmethod
    def _kept(logits: Tensor, top: int) -> dict[str, Tensor]:
        ids = logits.topk(min(top, logits.shape[-1] - 1)).indices.sort(-1).values
        classes = bucketed(logits, ids)
        return {"ids": ids.int(), "log_p": classes[:, :-1].half(), "others": classes[:, -1]}

    def fetch(self, batch: Batch, rows: Tensor) -> Known:
        found: list[list[Tensor]] = [[], [], []]
        for row in rows.tolist():
            with safe_open(self._path(row // BLOCK), framework="pt") as file:
                for tensors, name in zip(found, ("ids", "log_p", "others"), strict=True):
                    tensors.append(file.get_tensor(f"{row}.{name}"))
        ids, log_p, others = (torch.cat(tensors).to(batch.labels.device) for tensors in found)
        return ids.long(), log_p.float(), others.unsqueeze(-1)

    def compare(self, logits: Tensor, temperature: float, *known: Tensor) -> tuple[Tensor, Tensor]:
        ids, log_p, others = known
        return torch.cat((log_p, others), -1), bucketed(logits / temperature, ids)

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:05d}.safetensors"


def read(text: Examples, rows: Tensor, device: torch.device) -> Batch:
    """Some windows of ``text``, on ``device``."""
    assert text.targets is not None
    inputs = {name: ids[rows].to(device) for name, ids in text.inputs.items()}
    return Batch(inputs, text.targets[rows].to(device), text.options)
