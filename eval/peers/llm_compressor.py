"""llm-compressor (https://github.com/vllm-project/llm-compressor).

Saved as compressed-tensors; pruned models as dense files, the only way it has.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

PACKAGES = ["llmcompressor", "compressed-tensors"]
if not torch.accelerator.is_available():
    # AWQ pins memory whether or not there is a device to copy it to, and fails where there is
    # none. Pinning changes no number.
    IntermediatesCache.pin_memory = lambda *_: None


def compress(job: SimpleNamespace, model: Any) -> Any:
    windows = load_file(job.tokens)["tokens"]
    calibration: dict[str, Any] = {}
    if job.method != "rtn":
        calibration = {
            "dataset": Dataset.from_dict({"input_ids": windows.tolist()}),
            "num_calibration_samples": len(windows),
            "max_seq_length": windows.shape[1],
            "shuffle_calibration_samples": False,
        }
    oneshot(model=model, recipe=recipe(job), **calibration)
    return model


def recipe(job: SimpleNamespace) -> list[Any]:
    """The modifiers of a method, on every Linear module but the head."""
    options = dict(job.options)
    if job.method in ("wanda", "sparsegpt"):
        prune = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[job.method]
        pattern = {"mask_structure": job.pattern} if job.pattern else {}
        # Its pruning compares "lm_head." with a dot at the end, which only an expression matches.
        where = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
        return [prune(sparsity=job.sparsity, **pattern, **where, **options)]
    weights = {
        "num_bits": job.bits,
        "type": "int",
        "symmetric": job.symmetric,
        "strategy": "group" if job.group else "channel",
        "group_size": job.group,
    }
    if "observer" in options:
        weights["observer"] = options.pop("observer")
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    quantize = {"config_groups": groups, "ignore": ["lm_head"]}
    if job.method == "gptq":
        return [GPTQModifier(**quantize, **options)]
    if job.method == "awq":
        return [AWQModifier(**options), QuantizationModifier(**quantize)]
    return [QuantizationModifier(**quantize)]


def save(job: SimpleNamespace, model: Any, folder: Path) -> None:
    model.save_pretrained(folder, save_compressed=True)


def reload(folder: Path) -> Any:
    packed = hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **how)
