"""Tiny random models of many families, each a folder, and what the tests here ask of a result."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

import compress
from compress import run as runs
from compress.plain_load import observe
from compress.recipe import Recipe
from compress.source import DEMO
from compress.verify import relative_difference

TEXT = "".join(f"def f{i}(x):\n    return x + {i * i}\n\n\n" for i in range(3000))
TOKENS = {"vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
LLAMA = {
    **TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
GROUPED = {**LLAMA, "num_key_value_heads": 1}
BERT = {**LLAMA, "hidden_dropout_prob": 0.0}
# name → model class, config class, its arguments
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 32}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 32}),
    "phi": ("PhiForCausalLM", "PhiConfig", LLAMA),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", LLAMA),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **TOKENS, "hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "ffn_dim": 128, "max_position_embeddings": 64,
            "init_std": 0.3,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            **TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64,
            "initializer_range": 0.3,
        },
    ),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "vocab_size": 2048, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 2,
            "max_position_embeddings": 64, "initializer_range": 0.3,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 2048, "d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2,
            "num_heads": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
        },
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **TOKENS, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128, "max_position_embeddings": 64, "decoder_start_token_id": 0,
            "forced_eos_token_id": None, "init_std": 0.15,
        },
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 128, "image_size": 32, "initializer_range": 0.3,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 2048, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128, "num_mel_bins": 16, "max_source_positions": 32,
            "max_target_positions": 32, "decoder_start_token_id": 0, "bos_token_id": 0,
            "eos_token_id": 1, "pad_token_id": 1, "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}  # fmt: skip


def save(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A folder with a random model of ``family`` and the demo's tokenizer; "demo" is a copy."""
    if family == "demo":
        shutil.copytree(DEMO, folder)
        return folder
    kind, config, arguments = FAMILIES[family]
    torch.manual_seed(seed)
    made = getattr(transformers, config)(**arguments | changes)
    getattr(transformers, kind)(made).save_pretrained(folder)
    if family not in ("vit", "whisper"):
        shutil.copyfile(DEMO / "tokenizer.json", folder / "tokenizer.json")
        config = json.loads((DEMO / "tokenizer_config.json").read_text())
        if kind.endswith("ForMaskedLM"):
            config["mask_token"] = config["eos_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def logits(model: Any, folder: Path) -> list[float]:
    """The entries of the model's output that ``compression.json`` of ``folder`` lists."""
    return observe(model, record(folder)["expected"]["inputs"])


def loaded_difference(folder: Path) -> float:
    """How far ``compress.load`` is from the logits that the compressor had in memory."""
    return relative_difference(
        logits(compress.load(folder), folder), record(folder)["expected"]["logits"]
    )


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compression.json").read_text())


def killed(recipe: Recipe, out: Path, *moments: tuple[str, int]) -> None:
    """Apply ``recipe`` again and again, each time until a stage has done so much."""
    for label, count in moments:
        events = runs.run(recipe, out)
        for event in events:
            if event.label == label and event.done == count:
                break
        events.close()
        assert not out.exists()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder``."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
