"""Training in several processes, with gradients exchanged (DDP) or parameters spread (FSDP2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import yaml

SCRIPT = """
import json, sys
from pathlib import Path
from compress import distributed, recipe, run
losses = []
events = run.run(recipe.load_one(sys.argv[1]), Path(sys.argv[2]))
for event in events:
    if "loss" in event.numbers:
        losses.append(event.numbers["loss"])
if not distributed.rank():
    Path(sys.argv[2] + ".json").write_text(json.dumps(losses))
"""
TEXT = {"samples": 24, "length": 16, "batch": 8}
STAGES = [
    {"use": "magnitude", "pattern": "2:4", "targets": ["mlp"]},
    {"use": "distill", "steps": 6, **TEXT, "hidden": 0.1, "on_policy": 0.3, "accumulate": 2},
    {"use": "rtn", "bits": 3, "group": 32, "targets": ["q_proj"], "symmetric": False},
    {"use": "tune_scales", "steps": 4, **TEXT, "targets": ["q_proj"], "cache": 512},
    {"use": "lora", "rank": 2, "steps": 4, **TEXT, "targets": ["q_proj"]},
]


@pytest.fixture(scope="module")
def trained(
    text: str, source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, list[float]]]:
    """``trained("name", processes, sharded)``: the folder, and the loss of every step."""
    root = tmp_path_factory.mktemp("several")
    recipe = {
        "model": str(source("llama", num_key_value_heads=2)),
        "calibration": {"data": text},
        "stages": STAGES,
        "storage": "compact",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (root / "several.py").write_text(SCRIPT)

    def run(name: str, processes: int, sharded: bool = False) -> tuple[Path, list[float]]:
        out = root / name / "result"
        out.parent.mkdir()
        launcher: list[Any] = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc-per-node={processes}"]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path.cwd()),
            "ACCELERATE_USE_FSDP": str(sharded).lower(),
        }
        done = subprocess.run(
            [*launcher, root / "several.py", root / "recipe.yaml", out],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return out, json.loads(Path(f"{out}.json").read_text())

    return run


def test_two_processes_train_what_one_does(trained: Callable[..., Any]) -> None:
    alone, expected = trained("one", 1)
    assert len(expected) == 14
    for name, sharded in (("ddp", False), ("fsdp", True)):
        folder, losses = trained(name, 2, sharded)
        assert losses == pytest.approx(expected, rel=2e-3), name
        one, two = models.record(alone), models.record(folder)
        assert two["bytes"] == one["bytes"]
        for a, b in zip(one["stages"], two["stages"], strict=True):
            for point, other in zip(a.get("curve", []), b.get("curve", []), strict=True):
                assert point == pytest.approx(other, rel=2e-3)
        assert models.loaded_difference(folder) < 5e-3
