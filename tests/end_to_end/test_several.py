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

from compress import recipe as recipes
from compress import run as runs

SCRIPT = """
import json, os, sys
from pathlib import Path
from compress import distributed, recipe, run
for name, sharded in (("ddp", "false"), ("fsdp", "true")):
    os.environ["ACCELERATE_USE_FSDP"] = sharded
    out = Path(sys.argv[2], name)
    events = run.run(recipe.load_one(sys.argv[1]), out, verify=False)
    losses = [event.numbers["loss"] for event in events if "loss" in event.numbers]
    if not distributed.rank():
        Path(f"{out}.json").write_text(json.dumps(losses))
"""
TEXT = {"samples": 24, "length": 16, "batch": 8}
STAGES: list[dict[str, Any]] = [
    {"use": "magnitude", "pattern": "2:4", "targets": ["mlp"]},
    {
        "use": "distill",
        "steps": 5,
        **TEXT,
        "hidden": 0.1,
        "on_policy": 0.3,
        "accumulate": 2,
        "optimizer": "muon",
    },
    {"use": "rtn", "bits": 3, "group": 32, "targets": ["q_proj"], "symmetric": False},
    {"use": "tune_scales", "steps": 4, **TEXT, "targets": ["q_proj"], "cache": 512},
    {"use": "lora", "rank": 2, "steps": 2, **TEXT, "targets": ["q_proj"]},
]


def test_two_processes_train_what_one_does(
    text: str, source: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = {
        "model": str(source("llama", num_key_value_heads=2)),
        "calibration": {"data": text},
        "stages": STAGES,
        "storage": "compact",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "several.py").write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
            "--standalone", tmp_path / "several.py", tmp_path / "recipe.yaml", tmp_path,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    events = runs.run(recipes.load_one(recipe), tmp_path / "alone" / "one", verify=False)
    expected = [event.numbers["loss"] for event in events if "loss" in event.numbers]
    assert len(expected) == 11
    one = models.record(tmp_path / "alone" / "one")
    for name in ("ddp", "fsdp"):
        losses = json.loads((tmp_path / f"{name}.json").read_text())
        assert losses == pytest.approx(expected, rel=2e-3), name
        two = models.record(tmp_path / name)
        assert two["bytes"] == one["bytes"]
        for a, b in zip(one["stages"], two["stages"], strict=True):
            for point, other in zip(a.get("curve", []), b.get("curve", []), strict=True):
                assert point == pytest.approx(other, rel=2e-3)
        assert models.loaded_difference(tmp_path / name) < 5e-3
