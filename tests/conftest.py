"""What tests share: one thread, a text, and a folder for each kind of model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BERT, GPT2, LLAMA, T5, TEXT, VIT, save
from transformers import AutoTokenizer

from compress.source import DEMO


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "code.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made = {
        "llama": ("LlamaForCausalLM", LLAMA, 0),
        "other llama": ("LlamaForCausalLM", LLAMA, 1),
        "gpt2": ("GPT2LMHeadModel", GPT2, 0),
        "bert": ("BertForMaskedLM", BERT, 0),
        "encoder": ("BertModel", BERT, 0),
        "classifier": ("BertForSequenceClassification", BERT, 0),
        "other classifier": ("BertForSequenceClassification", BERT, 1),
        "t5": ("T5ForConditionalGeneration", T5, 0),
        "vit": ("ViTForImageClassification", VIT, 0),
    }
    return {
        name: save(root / name, kind, config, seed, tokenizer=name != "vit")
        for name, (kind, config, seed) in made.items()
    }


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)
