"""Compressed folders read back matrix by matrix: the weights that loading puts into the modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint import load
from compress.errors import ModelError
from compress.stored import Stored

LORA = {"use": "lora", "rank": 2, "steps": 2, "samples": 8, "length": 16, "batch": 4}
FOLDERS: dict[str, tuple[str, set[str], list[dict[str, Any]]]] = {
    "plain": ("llama", {"dense"}, [{"use": "magnitude"}]),
    "packed": ("llama", {"dense", "quantized"}, [{"use": "rtn"}]),
    "whole rows": ("llama", {"dense", "quantized"}, [{"use": "rtn", "group": "channel"}]),
    "zero-points": ("llama", {"dense", "quantized"}, [{"use": "rtn", "symmetric": False}]),
    "mixed": (
        "llama",
        {"dense", "quantized"},
        [{"use": "rtn", "targets": ["mlp"]}, {"use": "rtn", "bits": 8, "targets": ["attention"]}],
    ),
    "a byte a code": ("llama", {"dense", "quantized"}, [{"use": "w8a8"}]),
    "tables": ("llama", {"quantized"}, [{"use": "rtn", "targets": ["all"]}]),
    "float8": ("llama", {"dense", "float8"}, [{"use": "fp8"}]),
    "int8": ("llama", {"dense", "int8"}, [{"use": "int8"}]),
    "nf4": ("llama", {"dense", "nf4"}, [{"use": "nf4"}]),
    "double": ("llama", {"dense", "nf4"}, [{"use": "nf4", "double_quant": True}]),
    "Conv1D": ("gpt2", {"quantized"}, [{"use": "rtn", "targets": ["all"]}]),
    "factors": ("bert", {"dense", "lowrank"}, [{"use": "svd", "ratio": 0.5}]),
    "adapter": ("llama", {"dense", "sum"}, [{"use": "rtn", "bits": 3}, LORA]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_weights_are_those_that_loading_computes(
    name: str, source: Callable[..., Path], apply: Callable[..., Path]
) -> None:
    family, kinds, stages = FOLDERS[name]
    folder = apply(source(family), stages)
    found, model = Stored(folder), load(folder, dtype=torch.float32)
    weights = {site: found.weight(site) for site in found.anatomy.sites}
    assert {weight.kind for weight in weights.values()} == kinds
    for site, weight in weights.items():
        module: Any = model.get_submodule(site.name)
        if weight.kind in ("int8", "nf4", "sum"):
            continue  # the module multiplies by codes: below
        matrix = module.weight.T if site.layout == "conv1d" else module.weight
        torch.testing.assert_close(weight.dense(), matrix.float(), rtol=8e-3, atol=1e-6)
    state = model.state_dict()
    for key, tensor in found.others().items():
        torch.testing.assert_close(tensor.float(), state[key].float())


@pytest.mark.parametrize("name", ["int8", "nf4", "double", "adapter"])
def test_modules_that_multiply_by_codes_have_these_weights(
    name: str, source: Callable[..., Path], apply: Callable[..., Path]
) -> None:
    family, _, stages = FOLDERS[name]
    folder = apply(source(family), stages)
    found, model = Stored(folder), load(folder, dtype=torch.float32)
    for site in found.anatomy.sites:
        if site.layout == "linear":
            module: Any = model.get_submodule(site.name)
            x = torch.eye(site.shape[1])
            expected = module(x) - (0 if module.bias is None else module.bias)
            weight = found.weight(site).dense()
            assert (expected.T - weight).norm() <= 0.02 * weight.norm()


def test_unknown_layouts_are_refused(source: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for file in source("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = (folder / "config.json").read_text().rstrip().rstrip("}")
    (folder / "config.json").write_text(config + ', "quantization_config": {"quant_method": "x"}}')
    with pytest.raises(ModelError, match="layout of x"):
        Stored(folder)
