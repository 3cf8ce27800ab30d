"""Models of another shape: fewer blocks, narrower ones, alone and in chains, of several families.

``apply`` ends with ``verify``: plain transformers, in a process without this library, loaded the
folder, gave the logits that the model had in memory, and generated where it can.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file

import compress
from compress import recipe as recipes
from compress import run as runs
from compress.errors import CompressError, ModelError, RecipeError
from compress.preflight import preflight
from compress.source import Source

Apply = Callable[..., Path]
Sources = Callable[..., Path]
DEPTH = {"use": "depth", "amount": 0.5}
MLP = {"use": "width", "targets": ["mlp"]}
HEADS = {"use": "width", "targets": ["attention"], "amount": 0.5}
BOTH = {"use": "width", "amount": 0.5}
UNEVEN = {"use": "width", "targets": ["mlp"], "allocation": "error", "multiple": 16}
DISTILL = {"use": "distill", "steps": 4, "samples": 8, "length": 16, "batch": 4}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
HEADED = {"llama": GROUPED, "gpt2": {"n_head": 4}, "bert": {"num_attention_heads": 4}}


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def parameters(folder: Path) -> int:
    tensors = load_file(folder / "model.safetensors").values()
    return sum(tensor.numel() for tensor in tensors)


def plain(family: str, stage: dict[str, Any]) -> bool:
    """Whether config.json can say the shape: GPT-2 and BERT have no size of a head of its own."""
    return "allocation" not in stage and (family == "llama" or stage in (DEPTH, MLP))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(
    "stage", [DEPTH, MLP, HEADS, BOTH, UNEVEN], ids=["depth", "mlp", "heads", "both", "uneven"]
)
def test_shapes(family: str, stage: dict[str, Any], apply: Apply, source: Sources) -> None:
    model = source(family, **HEADED[family])
    folder = apply(model, [stage], calibrated=True)
    record = models.record(folder)
    assert record["storage"] == ("dense" if plain(family, stage) else "modelling file")
    assert models.loaded_difference(folder) < 1e-4
    assert parameters(folder) < parameters(model)
    assert record["parameters"] < record["base"]["parameters"]
    recipe = recipes.load_one({"model": str(model), "stages": [stage]})
    if stage is not UNEVEN:
        assert record["bytes"]["ideal"] == preflight(recipe, Source(model)).model_after
    loaded = compress.load(folder)
    if loaded.can_generate() and family != "bert":
        out = loaded.generate(torch.arange(5)[None], max_new_tokens=5, do_sample=False)
        assert out.shape == (1, 10)
