"""The benchmark of inference: a block compressed once and written many times runs as it should."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.checkpoint import load
from eval.benchmarks.inference import ROWS, compare, make_folders, memory


def test_rows_are_measured_beside_dense(tmp_path: Path) -> None:
    parameters = make_folders(tmp_path, 64, 3, {"int4", "depth"})
    dense, packed, half = (
        load(tmp_path / name, runtime=runtime)
        for name, runtime in (("dense", "transformers"), ("int4", "packed"), ("depth", "packed"))
    )
    assert parameters == dense.num_parameters()
    assert len(packed.model.layers) == 3
    assert len(half.model.layers) == 2
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        right, found = (model(tokens).logits.float() for model in (dense, packed))
    assert (found - right).norm() < 0.3 * right.norm()  # 4 bits of random weights
    row = next(row for row, (folder, _) in ROWS.items() if folder == "int4")
    found = compare(tmp_path, row, prompt=8, steps=2, repeats=2)
    assert min(found["decode ratio"], found["prefill ratio"]) > 0
    assert "23 × int4" in found["report"][0]
    assert memory(tmp_path, "depth", "bfloat16", prompt=8)["imports"] > 0
