"""Train a second small model, of another family than the demo model, to measure methods on.

    python -m eval.benchmarks.second_model runs/opt-code --steps 5000

An OPT (LayerNorm, biases, learned positions, no gates) with the demo model's tokenizer, on the
Python files of the packages that are installed here; the demo text, which is the standard library,
is not among them and remains held out.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from compress.checkpoint import load_tokenizer
from compress.data import Windows, windows
from compress.source import Source
from compress.training import Objective, Schedule, Trainer

LENGTH = 256


def read(folder: Path, tokenizer: Any, samples: int) -> Windows:
    """Windows of the Python files under ``folder``; other files there may be anything."""
    with tempfile.TemporaryDirectory() as copies:
        for number, file in enumerate(sorted(folder.rglob("*.py"))):
            text = file.read_text(encoding="utf-8", errors="replace")
            Path(copies, f"{number}.txt").write_text(text, encoding="utf-8")
        return windows(copies, tokenizer, part="calibration", samples=samples, length=LENGTH)


class NextToken(Objective):
    """Cross-entropy in nats a token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor, step: int | None) -> Tensor:
        rows = rows.to(next(self.model.parameters()).device)
        return self.model(input_ids=rows, labels=rows).loss * len(rows)


def report(step: int, steps: int, numbers: dict[str, float]) -> None:
    if "held" in numbers:
        print(f"step {step} of {steps}: held-out loss {numbers['held']:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--text", type=Path, default=sysconfig.get_paths()["purelib"], help="folder"
    )
    parser.add_argument("--samples", type=int, default=40_000, help="windows of 256 tokens")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=5)
    options = parser.parse_args()
    tokenizer: Any = load_tokenizer(Source("demo").folder)
    text = read(options.text, tokenizer, options.samples)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer), max_position_embeddings=LENGTH, hidden_size=options.width,
        word_embed_proj_dim=options.width, ffn_dim=4 * options.width, dropout=0,
        num_hidden_layers=options.blocks, num_attention_heads=options.width // 16,
        activation_function="gelu_new", bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model: Any = OPTForCausalLM(config)
    schedule = Schedule(options.steps, 3e-3, 16, weight_decay=0.01, check_every=250, patience=99)
    with tempfile.TemporaryDirectory() as work:
        trainer = Trainer(
            NextToken(model), schedule, seed=0, folder=Path(work), report=report, length=LENGTH
        )
        trainer.fit(text.tokens[:-64], text.tokens[-64:])
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
