"""The script that trains the dense ladder: its sizes, its text, and that done work is kept."""

from __future__ import annotations

import json
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.checkpoint import load_tokenizer
from compress.data import Windows
from compress.source import DEMO
from eval.benchmarks import ladder
from eval.metrics.size import count_parameters


def test_the_demo_model_is_one_of_the_sizes() -> None:
    assert (128, 6) in ladder.SIZES
    made = ladder.configuration(128, 6).to_dict()
    demo = json.loads((DEMO / "config.json").read_text())
    assert {key: made[key] for key in demo if key in made and key != "dtype"} == {
        key: value for key, value in demo.items() if key in made and key != "dtype"
    }


@pytest.mark.parametrize(
    ("fields", "free"),
    [
        ([("License-Expression", "Apache-2.0 OR BSD-2-Clause")], True),
        ([("License-Expression", "MPL-2.0 AND MIT")], False),
        ([("Classifier", "License :: OSI Approved :: MIT License")], True),
        ([("Classifier", "License :: OSI Approved")], False),
        ([("Classifier", "License :: OSI Approved :: GNU LGPL")], False),
        ([("License", "BSD-3-Clause")], True),
        ([], False),
    ],
)
def test_only_permissive_packages_are_read(fields: list[tuple[str, str]], free: bool) -> None:
    metadata = Message()
    for name, value in fields:
        metadata[name] = value
    package: Any = SimpleNamespace(metadata=metadata)
    assert ladder._permissive(package) is free


def test_a_size_is_trained_once_and_its_row_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "HELD", 4)
    tokens = torch.randint(0, 2048, (12, 256), generator=torch.Generator().manual_seed(0))
    text = Windows(tokens, torch.ones_like(tokens), "here", "calibration", "ab")
    out, tokenizer = tmp_path / "8x1-seed0", load_tokenizer(DEMO)
    held = ladder.train(out, (8, 1), 0, 3e-3, text, tokenizer)
    assert held < 7.7  # ln 2048 = 7.62 before
    assert count_parameters(out) == 2048 * 8 + 12 * 8 * 8 + 3 * 8
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert ladder.train(out, (8, 1), 0, 3e-3, text, tokenizer) == held
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    row = ladder.measure(out, (8, 1), 0, [3e-3], text)
    assert row.detail["tokens"] == 2 * ladder.BATCH * 256
    assert row.detail["held_out"] == held
    assert row.detail["text"]["hash"] == "ab"
    assert len(row.samples) == 128
