"""nf4 folders stay right after a forward pass.

On CPUs with AVX512-BF16 the first forward pass in eval mode repacks 4-bit weights in place, and
saving, training and dequantizing are silently wrong from then on (bitsandbytes #2078).
``compress.load`` keeps them unpacked. Elsewhere nothing is repacked, and these tests pass at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import PreTrainedModel

import compress
from compress.verify import relative_difference

IDS = torch.tensor([[7, 99, 1024, 5, 12, 300, 8, 77]])
CLOSE = 1e-3  # float32 throughout


@pytest.fixture(params=["llama", "gpt2"])
def folder(
    request: pytest.FixtureRequest, apply: Callable[..., Path], source: Callable[..., Path]
) -> Path:
    made = apply(source(request.param), [{"use": "nf4"}])
    assert models.record(made)["storage"] == "bitsandbytes"
    return made


def forward(model: PreTrainedModel) -> list[float]:
    with torch.no_grad():
        return model(input_ids=IDS).logits.flatten().tolist()


def test_loaded_weights_are_not_repacked(folder: Path) -> None:
    model = compress.load(folder)
    before = {name: p.clone() for name, p in model.named_parameters()}
    first = forward(model)
    assert forward(model) == first
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_save_after_a_forward_pass(folder: Path, tmp_path: Path) -> None:
    model = compress.load(folder)
    before = forward(model)
    # transformers 5.23 cannot put 4-bit tensors back into "original format".
    model.save_pretrained(tmp_path / "again", save_original_format=False)
    assert relative_difference(forward(model), before) < CLOSE
    assert relative_difference(forward(compress.load(tmp_path / "again")), before) < CLOSE


def test_dequantize_after_a_forward_pass(folder: Path) -> None:
    model = compress.load(folder)
    before = forward(model)
    assert relative_difference(forward(model.dequantize(torch.float32)), before) < CLOSE


def test_gradients_after_a_forward_pass(folder: Path) -> None:
    clean = gradients(compress.load(folder))
    used = compress.load(folder)
    forward(used)
    after = gradients(used)
    assert clean.keys() == after.keys()
    for name, gradient in clean.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(after[name], gradient, rtol=1e-3, atol=1e-6)


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Of every LoRA matrix; the same adapter each time, B away from zero."""
    targets = ["c_attn", "c_fc"] if model.config.model_type == "gpt2" else ["q_proj", "up_proj"]
    fan = model.config.model_type == "gpt2"
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, fan_in_fan_out=fan)
    model.requires_grad_(False)
    inject_adapter_in_model(config, model)
    torch.manual_seed(0)
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for parameter in adapters.values():
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.requires_grad_(True)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapters.values())
    return {name: p.grad for name, p in adapters.items() if p.grad is not None}
