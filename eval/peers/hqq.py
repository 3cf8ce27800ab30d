"""HQQ (https://github.com/mobiusml/hqq): no data, its own packing, fractional zero-points."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel

PACKAGES = ["hqq"]


def compress(job: SimpleNamespace, model: Any) -> Any:
    """``options``: ``axis`` 1 groups inputs, as everyone else does; 0 groups outputs."""
    config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group, **job.options)
    AutoHQQHFModel.quantize_model(
        model, quant_config=config, compute_dtype=model.dtype, device="cpu"
    )
    return model


def save(job: SimpleNamespace, model: Any, folder: Path) -> None:
    AutoHQQHFModel.save_quantized(model, str(folder))


def reload(folder: Path) -> Any:
    return AutoHQQHFModel.from_quantized(str(folder), compute_dtype=torch.bfloat16, device="cpu")
