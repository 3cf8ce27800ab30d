"""Compress Hugging Face models from a recipe.

    import compress
    compress.apply({"model": "demo", "stages": [{"use": "rtn", "bits": 4}]}, out="small")
    model = compress.load("small")

Names are imported when they are first used, so that ``import compress`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "CompressError": "compress.errors",
    "Compressor": "compress.compressors.base",
    "LayerCompressor": "compress.compressors.base",
    "LayerProblem": "compress.problem",
    "Recipe": "compress.recipe",
    "Stage": "compress.recipe",
    "TrainingCompressor": "compress.compressors.base",
    "Weight": "compress.weights",
    "apply": "compress.api",
    "compressor": "compress.api",
    "Exporter": "compress.export.base",
    "load": "compress.checkpoint",
    "load_tokenizer": "compress.checkpoint",
    "relative_error": "compress.problem",
    "verify": "compress.verify",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'compress' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
