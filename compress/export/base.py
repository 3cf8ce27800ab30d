"""What an exporter is: another format that a model folder can be written in, and how to run it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from compress.checkpoint import load
from compress.errors import CheckpointError
from compress.plain_load import make_inputs
from compress.stored import Stored
from compress.verify import probe_inputs

Held = Literal["exactly", "nearly", "expanded", "rounded again"]
"""How a format holds a weight: the same numbers, packed as they were; the same integers, scales or
minima rounded to 16 bits; as a plain matrix, its entries rounded to the model's dtype; on another
grid, that of the format."""


class Exporter(BaseModel, ABC):
    """A format, and its options as fields. A plug-in of the entry point group
    ``compress.exporters``; a class makes no instance that keeps anything.

    name    as ``--to`` takes it
    needs   what must be installed to write and to read it, in words
    holds   kind of weight → ``Held``, maybe with a colon and the reason; others are refused
    suffix  of the file that it writes; empty for a folder
    rounds_inputs  whether readers round what a matrix reads to 8 bits where the folder says so
            (w8a8, fp8); where they do not, products are of what comes in as it is
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str] = ""
    needs: ClassVar[str] = "transformers"
    holds: ClassVar[dict[str, str]] = {}
    suffix: ClassVar[str] = ""
    rounds_inputs: ClassVar[bool] = False

    def refusal(self, stored: Stored) -> str | None:
        """Why this model cannot be held, beyond its kinds of weight; None when it can."""
        return None

    @abstractmethod
    def write(self, stored: Stored, out: Path) -> dict[str, Any]:
        """Write the file or folder ``out``, a hidden path; returns notes for the record.

        ``notes["held"]`` may say ``Held`` of single sites, where it is not what ``holds`` says of
        their kind.
        """

    def logits(self, out: Path, tokens: Tensor) -> Tensor:
        """What a program that reads the format makes of ``out``, for the check: transformers, if
        it does.

        ``tokens``: int64 [batch, length]; the main input of models that read something else.
        Returns [batch, length, vocabulary], of any floating dtype.
        """
        return run(load(out, dtype=torch.float32), tokens)

    def other_logits(self, out: Path, tokens: Tensor) -> dict[str, Tensor]:
        """The same from other programs that are installed here, by their names: these may round
        what a matrix reads, and are held to ``verify.TOLERANCE_INT8``."""
        return {}


def probe(model: Any) -> Tensor:
    """The fixed input on which a model and its export are compared."""
    return make_inputs(probe_inputs(model))[model.main_input_name]


def run(model: Any, tokens: Tensor) -> Tensor:
    """What a transformers model puts out for ``probe``: logits, or what comes first."""
    inputs = make_inputs(probe_inputs(model)) | {model.main_input_name: tokens}
    with torch.no_grad():
        output = model(
            **{k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        )
    return output.logits if hasattr(output, "logits") else output[0]


def required(module: str, extra: str) -> Any:
    """A module of an optional package.

    Raises:
        CheckpointError: it is not installed; says which extra of this package brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise CheckpointError(
            f"{module} is not installed: pip install 'compresskit[{extra}]' ({error})"
        ) from error
