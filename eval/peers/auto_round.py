"""AutoRound (https://github.com/intel/auto-round), saved in its own format."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoTokenizer

PACKAGES = ["auto-round"]


def compress(job: SimpleNamespace, model: Any) -> Any:
    """``options`` are AutoRound's own: ``iters``, ``enable_alg_ext``, …"""
    windows = load_file(job.tokens)["tokens"]
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        scheme={
            "bits": job.bits,
            "group_size": job.group or -1,
            "sym": job.symmetric,
            "data_type": "int",
            "act_bits": 16,
        },
        dataset=list(windows.split(8)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=8,
        seed=job.seed,
        device_map="cpu",
        enable_torch_compile=False,
        **job.options,
    )
    rounder.quantize()
    return rounder


def save(job: SimpleNamespace, model: Any, folder: Path) -> None:
    model.save_quantized(str(folder), format="auto_round")
