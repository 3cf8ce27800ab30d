"""bitsandbytes, through transformers, which quantizes while it loads: that is what is timed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import transformers

PACKAGES = ["bitsandbytes"]
# On CPUs with AVX512-BF16 it repacks weights in place when they are first used, and does not put
# them back (bitsandbytes #2078): what is saved after that is wrong.
bnb.nn.modules.has_avx512bf16 = lambda: False


def load(job: SimpleNamespace) -> Any:
    return None


def compress(job: SimpleNamespace, model: Any) -> Any:
    """``options`` are those of ``BitsAndBytesConfig``."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        job.model, dtype="auto", quantization_config=transformers.BitsAndBytesConfig(**job.options)
    )
