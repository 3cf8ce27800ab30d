"""Tiny random models with the demo tokenizer, and the context to measure them in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from compress.source import DEMO

if TYPE_CHECKING:
    from eval.metrics.base import Context

TEXT = "".join(f"def f{i}(x):\n    return x + {i * i}\n\n\n" for i in range(2000))
SMALL = {"vocab_size": 2048, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = transformers.LlamaConfig(
    **SMALL, intermediate_size=64, max_position_embeddings=64, initializer_range=0.5
)
BERT = transformers.BertConfig(
    **SMALL, intermediate_size=64, max_position_embeddings=64, initializer_range=0.5
)
GPT2 = transformers.GPT2Config(
    vocab_size=2048, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5
)
T5 = transformers.T5Config(
    vocab_size=2048, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
    decoder_start_token_id=0, pad_token_id=0, initializer_factor=5.0,
)  # fmt: skip
VIT = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32
)


def save(folder: Path, kind: str, config: Any, seed: int = 0, tokenizer: bool = True) -> str:
    torch.manual_seed(seed)
    getattr(transformers, kind)(config).save_pretrained(folder)
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / name, folder)
    return str(folder)


def context(folder: str, data: str | None, original: str | None = None, **settings: Any) -> Context:
    from eval.metrics.base import Context, Settings  # not every test needs eval

    return Context(
        folder, data, original, Settings(**{"samples": 4, "length": 12, "batch": 3} | settings)
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def normal(*shape: int, seed: int = 0, scale: float = 0.05) -> torch.Tensor:
    """float32, the same numbers for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
