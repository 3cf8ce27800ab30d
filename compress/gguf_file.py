"""A GGUF file as a checkpoint: found, and asked what it holds and how it was made."""

from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError

RECORD = "compresskit.record"  # our key in a file's metadata: parts of compression.json


def find(path: str | Path) -> Path | None:
    """The file that ``path`` is, or the only one of a folder without config.json."""
    place = Path(path).expanduser()
    if place.suffix == ".gguf" and place.is_file():
        return place
    files = list(place.glob("*.gguf"))
    return files[0] if len(files) == 1 and not (place / "config.json").exists() else None


def tokenizer(file: Path) -> Any:
    """The tokenizer that transformers makes of the file's metadata."""
    from transformers import AutoTokenizer

    required()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def config(file: Path) -> Any:
    """The config that transformers makes of the file's metadata."""
    from transformers import AutoConfig

    required()
    found = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    if found.model_type == "gpt2":  # transformers keeps the length under a name of old
        found.n_positions = getattr(found, "n_ctx", found.n_positions)
    return found


def record(file: Path) -> dict[str, Any]:
    """What our exporter wrote of the model's making; empty for files of others."""
    if find_spec("gguf") is None:
        return {}
    from gguf import GGUFReader

    field = GGUFReader(file).fields.get(RECORD)
    return {} if field is None else json.loads(field.contents())


def tensors(file: Path) -> Counter[str]:
    """Entries of the file's tensors, by the name of their type.

    Raises:
        CheckpointError: the gguf package is missing.
    """
    required()
    from gguf import GGUFReader

    found: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        found[tensor.tensor_type.name] += int(tensor.n_elements)
    return found


def required() -> None:
    if find_spec("gguf") is None:
        raise CheckpointError("GGUF files are read by gguf: pip install 'compresskit[gguf]'")
