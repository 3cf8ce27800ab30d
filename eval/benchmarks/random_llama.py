"""A Llama of random weights with the demo model's tokenizer, of any size, for timings.

    python -m eval.benchmarks.random_llama runs/llama-512 --width 512 --blocks 4
    python -m eval.peers --model runs/llama-512 --methods gptq --bits 4
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.source import DEMO

VOCABULARY = 2048  # the demo's tokenizer, which GGUF files must carry


def config(width: int, blocks: int, head: int, **rest: Any) -> LlamaConfig:
    """Heads of ``head`` channels, MLPs 11/4 as wide, in bfloat16; ``rest`` as in LlamaConfig."""
    return LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=blocks,
        num_attention_heads=width // head, vocab_size=VOCABULARY, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=0, architectures=["LlamaForCausalLM"], dtype="bfloat16",
        **rest,
    )  # fmt: skip


def save(folder: Path, width: int, blocks: int, head: int, **rest: Any) -> int:
    """Write the model of that ``config``, the same each time; returns its parameters."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config(width, blocks, head, **rest))
    model.to(torch.bfloat16).save_pretrained(folder)
    copy_tokenizer(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def copy_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--head", type=int, default=64)
    asked = parser.parse_args()
    print(f"{save(asked.out, asked.width, asked.blocks, asked.head):,} parameters")


if __name__ == "__main__":
    main()
