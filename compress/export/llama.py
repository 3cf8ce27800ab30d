"""llama.cpp, through llama-cpp-python: logits of a GGUF file, and what it makes of dense ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import CheckpointError
from compress.export.base import required


def opened(path: Path, length: int) -> Any:
    """The model in ``path`` with room for ``length`` tokens, giving logits for all of them."""
    llama_cpp = required("llama_cpp", "llama")
    try:
        return llama_cpp.Llama(
            str(path), n_ctx=length, n_batch=length, n_ubatch=length, n_threads=1,
            n_threads_batch=1, logits_all=True, verbose=False,
        )  # fmt: skip
    except ValueError as error:
        raise CheckpointError(f"{path}: llama.cpp does not load it ({error})") from error


def logits(path: Path, tokens: Tensor) -> Tensor:
    """float32 [batch, length, vocabulary] for tokens int64 [batch, length], a row at a time."""
    model = opened(path, tokens.shape[1])
    try:
        found = []
        for row in tokens.tolist():
            model.reset()
            model.eval(row)
            found.append(torch.from_numpy(np.array(model.scores[: len(row)])))
        return torch.stack(found)
    finally:
        model.close()


def quantized(dense: Path, out: Path, kind: str) -> None:
    """llama.cpp's own quantization of a 16-bit file, e.g. of ``kind`` Q4_K_M."""
    llama_cpp = required("llama_cpp", "llama")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = 1
    if llama_cpp.llama_model_quantize(str(dense).encode(), str(out).encode(), settings):
        raise CheckpointError(f"{dense}: llama.cpp does not quantize it to {kind}")
