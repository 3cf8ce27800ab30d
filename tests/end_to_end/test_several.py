"""Training in several processes: gradients exchanged (DDP), or all spread (FSDP2, ZeRO)."""

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
for name in sys.argv[3:]:
    engine, _, stage = name.partition("-")
    os.environ["ACCELERATE_USE_FSDP"] = str(engine == "fsdp")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(engine == "zero")
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = stage[:1]
    out = Path(sys.argv[2], name)
    losses = []
    for event in run.run(recipe.load_one(sys.argv[1]), out, verify=False):
        if "loss" in event.numbers:
            losses.append(event.numbers["loss"])
        if event.done == int(os.environ.get("DIE_AT", "-1")):
            os._exit(1)
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


def trained(
    recipe: dict[str, Any],
    folder: Path,
    *names: str,
    die_at: int | None = None,
    patience: int = 300,
) -> dict[str, list[float]]:
    """The losses of two processes, by the way in which they share the work."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "several.py").write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
            "--standalone", folder / "several.py", folder / "recipe.yaml", folder, *names,
        ],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
        | ({"DIE_AT": str(die_at)} if die_at else {}),
        capture_output=True, text=True, timeout=patience,
    )  # fmt: skip
    if die_at:
        assert done.returncode, "it was to be killed"
        return {}
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def alone(recipe: dict[str, Any], folder: Path) -> list[float]:
    """The losses of one process."""
    events = runs.run(recipes.load_one(recipe), folder / "alone" / "one", verify=False)
    return [event.numbers["loss"] for event in events if "loss" in event.numbers]


def test_two_processes_train_what_one_does(
    text: str, source: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = {
        "model": str(source("llama", num_key_value_heads=2)),
        "calibration": {"data": text},
        "stages": STAGES,
        "storage": "compact",
    }
    found = trained(recipe, tmp_path, "ddp", "fsdp")
    expected = alone(recipe, tmp_path)
    assert len(expected) == 11
    one = models.record(tmp_path / "alone" / "one")
    for name, losses in found.items():
        assert losses == pytest.approx(expected, rel=2e-3), name
        two = models.record(tmp_path / name)
        assert two["bytes"] == one["bytes"]
        for a, b in zip(one["stages"], two["stages"], strict=True):
            for point, other in zip(a.get("curve", []), b.get("curve", []), strict=True):
                assert point == pytest.approx(other, rel=2e-3)
        assert models.loaded_difference(tmp_path / name) < 5e-3


def test_deepspeed_trains_what_one_process_does_and_resumes(
    text: str, source: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    distill = {"use": "distill", "steps": 45, **TEXT, "accumulate": 2}
    tune = {"use": "tune_scales", "steps": 4, **TEXT, "targets": ["q_proj"]}
    recipe = {
        "model": str(source("llama", num_key_value_heads=2)),
        "calibration": {"data": text},
        "stages": [distill, {"use": "rtn", "bits": 3, "group": 32, "targets": ["q_proj"]}, tune],
    }
    trained(recipe, tmp_path, "zero-2-killed", die_at=25, patience=600)
    assert not (tmp_path / "zero-2-killed").exists()
    found = trained(recipe, tmp_path, "zero-1", "zero-2", "zero-2-killed", patience=600)
    expected = alone(recipe, tmp_path)
    assert len(expected) == 49
    for name, losses in found.items():
        assert losses == pytest.approx(expected[-len(losses) :], rel=2e-3), name
        assert models.loaded_difference(tmp_path / name) < 5e-3
    assert len(found["zero-2-killed"]) == 24
    whole, again = (models.digests(tmp_path / name) for name in ("zero-2", "zero-2-killed"))
    assert whole["model.safetensors"] == again["model.safetensors"]
