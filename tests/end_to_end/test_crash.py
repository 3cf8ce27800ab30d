"""Killed runs go on where they stopped, and end with the same bytes as uninterrupted ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import models
import pytest
import torch
import yaml
from safetensors import safe_open

from compress import recipe as recipes
from compress import run as runs
from compress.errors import CheckpointError
from compress.verify import Verifier

STAGES = [
    {"use": "svd", "ratio": 0.6},
    {"use": "distill", "steps": 60, "samples": 16, "length": 16, "batch": 4},
    {"use": "gptq", "bits": 3},
]
LORA = {"use": "lora", "samples": 8, "length": 16}
PATIENCE = 90.0  # seconds until a moment that never comes is a failure


@pytest.fixture(scope="module")
def recipe(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("crash") / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({"model": "demo", "calibration": {"data": text}, "stages": STAGES})
    )
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path, verifier: Verifier) -> dict[str, str]:
    """What an uninterrupted run writes."""
    torch.set_num_threads(1)
    out = recipe.parent / "result"
    runs.apply(recipes.load_one(recipe), out, verifier=verifier)
    return models.digests(out)


def start(recipe: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    # One thread, so that sums are made in one order: the bytes of a training depend on it.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "compress.cli", "apply", str(recipe), "--out", str(out), "-q"]
    return subprocess.Popen([*command, *options], env=environment, stderr=subprocess.PIPE)


def work(out: Path) -> Path:
    return out.parent / f".{out.name}.work"


def trained_steps(folder: Path) -> int:
    """Steps that the state file of a training has, 0 when there is none yet."""
    state = folder / "stage-1" / "training.safetensors"
    if not state.exists():
        return 0
    with safe_open(state, framework="pt") as file:
        return json.loads(file.metadata()["progress"])["step"]


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "after the third block": lambda w: (w / "stage-0" / "block-0002.safetensors").exists(),
    "while training": lambda w: trained_steps(w) >= 25,
    "in a pass over text": lambda w: (w / "stage-2" / "block-0003.safetensors").exists(),
    "while writing": lambda w: (w / "draft").exists(),
}


def test_killed_at_every_moment_and_run_again(
    recipe: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    """One output, killed at each moment in turn, and then run to its end."""
    out = tmp_path / "result"
    kept: dict[Path, int] = {}
    for moment, reached in MOMENTS.items():
        process = start(recipe, out)
        watched = watch(process, list(kept), reached, work(out))
        assert process.poll() is None, f"the run ended before it could be killed {moment}"
        process.send_signal(signal.SIGSTOP)  # it must not end while this one tries
        with pytest.raises(CheckpointError, match="another process is writing this output"):
            runs.apply(recipes.load_one(recipe), out)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not out.exists()
        assert watched == kept, "finished blocks were made again"
        kept = {p: p.stat().st_mtime_ns for p in work(out).glob("stage-*/block-*.safetensors")}
        assert kept
        assert (trained_steps(work(out)) > 0) is (moment == "while training")
    process = start(recipe, out)
    assert process.wait() == 0
    assert models.digests(out) == whole
    assert not work(out).exists()


def watch(
    process: subprocess.Popen[bytes],
    paths: list[Path],
    reached: Callable[[Path], bool],
    folder: Path,
) -> dict[Path, int]:
    """Wait for a moment of the run; when each of ``paths`` was last seen to be written."""
    seen = {}
    deadline = time.monotonic() + PATIENCE
    while not reached(folder) and process.poll() is None:
        assert time.monotonic() < deadline
        for path in paths:
            with suppress(FileNotFoundError):  # a stage's blocks go when the next stage is done
                seen[path] = path.stat().st_mtime_ns
        time.sleep(0.002)
    return seen


def test_same_recipe_same_bytes(
    text: str, verifier: Verifier, tmp_path: Path, source: Callable[..., Path]
) -> None:
    stages = [{"use": "rtn", "bits": 3, "group": 32}, {**LORA, "steps": 5}]
    data = {"model": str(source("llama")), "calibration": {"data": text}, "stages": stages}

    def bytes_of(name: str, seed: int) -> dict[str, str]:
        recipe = recipes.load_one({**data, "seed": seed})
        runs.apply(recipe, tmp_path / name / "result", verifier=verifier)
        return models.digests(tmp_path / name / "result")

    first = bytes_of("first", 0)
    assert bytes_of("second", 0) == first
    other = bytes_of("other seed", 1)
    assert other["model.safetensors"] == first["model.safetensors"]
    assert other["adapter_model.safetensors"] != first["adapter_model.safetensors"]


@pytest.mark.parametrize("change", ["recipe", "model"])
def test_old_work_of_something_else_is_not_used(
    change: str, verifier: Verifier, tmp_path: Path, source: Callable[..., Path]
) -> None:
    """Work that was left by a run of another recipe, or on other weights, is dropped."""
    model = models.save(tmp_path / "model", "llama")

    def recipe(bits: int) -> recipes.Recipe:
        return recipes.load_one({"model": str(model), "stages": [{"use": "rtn", "bits": bits}]})

    def interrupted(out: Path, bits: int) -> None:
        events = runs.run(recipe(bits), out, verifier=verifier)
        for event in events:
            if event.label == "check":
                break
        events.close()

    out = tmp_path / "out" / "result"
    interrupted(out, 3)
    assert len(list(work(out).glob("stage-0/block-*"))) == 3
    if change == "model":
        tensors = (source("llama", seed=1) / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(tensors)
    bits = 4 if change == "recipe" else 3
    runs.apply(recipe(bits), out, verifier=verifier)
    clean = tmp_path / "clean" / "result"
    runs.apply(recipe(bits), clean, verifier=verifier)
    assert models.digests(out) == models.digests(clean)
