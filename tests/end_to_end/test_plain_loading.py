"""Folders loaded by a stranger: a process in which this library cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import recipe as recipes
from compress import run as runs
from compress.verify import Verifier, relative_difference

LORA = {"use": "lora", "rank": 2, "steps": 6, "samples": 8, "length": 16, "batch": 4}
# name → (family, the storage expected, whether an adapter lies beside it, stages)
FOLDERS: dict[str, tuple[str, str, bool, list[dict[str, Any]]]] = {
    "dense": ("demo", "dense", False, [{"use": "magnitude"}]),
    "packed": ("demo", "compressed-tensors", False, [{"use": "rtn"}]),
    "zero-point": ("demo", "compressed-tensors", False, [{"use": "rtn", "symmetric": False}]),
    "packed table": ("demo", "compressed-tensors", False, [{"use": "rtn", "targets": ["all"]}]),
    "int8": ("demo", "bitsandbytes", False, [{"use": "int8"}]),
    "nf4": ("demo", "bitsandbytes", False, [{"use": "nf4"}]),
    "fp8": ("demo", "compressed-tensors", False, [{"use": "fp8"}]),
    "factors": ("demo", "modelling file", False, [{"use": "svd"}]),
    "factors of a tied table": (
        "gpt2",
        "modelling file",
        False,
        [{"use": "svd", "targets": ["all"]}],
    ),
    "masked": ("bert", "modelling file", False, [{"use": "svd", "targets": ["all"]}]),
    "packed, adapter": ("demo", "compressed-tensors", True, [{"use": "rtn", "bits": 3}, LORA]),
    "nf4, adapter": ("demo", "bitsandbytes", True, [{"use": "nf4"}, LORA]),
}
STRANGER = """
import json, sys
sys.modules["compress"] = None  # importing it raises from here on
import torch, transformers
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
replies, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    wanted = json.loads(line)
    reply = {}
    try:
        cls = getattr(transformers, wanted["class"])
        model = cls.from_pretrained(wanted["folder"], dtype="auto", **wanted["arguments"]).eval()
        ids = torch.tensor([wanted["ids"]])
        with torch.no_grad():
            reply["logits"] = model(input_ids=ids).logits[0, -1].float().tolist()
        if model.can_generate():
            made = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
            reply["generated"] = made[0].tolist()
    except Exception as error:
        reply["error"] = f"{type(error).__name__}: {error}"[:2000]
    print(json.dumps(reply), file=replies, flush=True)
"""
IDS = [7, 99, 1024, 5, 12, 300, 8, 77]


@pytest.fixture(scope="module")
def made(
    source: Callable[..., Path],
    verifier: Verifier,
    text: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    folders = {}
    for name, (family, storage, adapter, stages) in FOLDERS.items():
        recipe = {"model": str(source(family)), "calibration": {"data": text}, "stages": stages}
        out = root / name
        info = runs.apply(recipes.load_one(recipe), out, verifier=verifier)
        assert info["storage"] == storage
        assert (out / "adapter_config.json").exists() is adapter
        folders[name] = out
    return folders


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``ask(folder, "AutoModelForCausalLM", trust_remote_code=True)`` → what the stranger saw."""
    home = tmp_path_factory.mktemp("stranger")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(home)}
    process = subprocess.Popen(
        [sys.executable, "-c", STRANGER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=home,
        env=environment,
    )
    assert process.stdin
    assert process.stdout

    def asked(folder: Path, cls: str, **arguments: Any) -> dict[str, Any]:
        request = {"folder": str(folder), "class": cls, "arguments": arguments, "ids": IDS}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield asked
    process.kill()
    process.communicate()


@pytest.mark.parametrize("name", FOLDERS)
def test_plain_transformers_gives_the_same_model(
    name: str, made: dict[str, Path], ask: Callable[..., dict[str, Any]]
) -> None:
    family, storage, _, _ = FOLDERS[name]
    auto = "AutoModelForMaskedLM" if family == "bert" else "AutoModelForCausalLM"
    remote = {"trust_remote_code": True} if storage == "modelling file" else {}
    reply = ask(made[name], auto, **remote)
    assert "error" not in reply
    with torch.no_grad():
        ours = compress.load(made[name])(input_ids=torch.tensor([IDS])).logits[0, -1].tolist()
    assert relative_difference(reply["logits"], ours) < (0.1 if name == "int8" else 2e-2)
    if family != "bert":
        assert len(reply["generated"]) > len(IDS)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("factors", "AutoModelForCausalLM"),
        ("factors", "AutoModel"),
        ("factors", "LlamaForCausalLM"),
        ("factors", "LlamaModel"),
        ("factors", "MistralForCausalLM"),
        ("factors of a tied table", "AutoModelForCausalLM"),
        ("factors of a tied table", "GPT2LMHeadModel"),
        ("factors of a tied table", "GPT2Model"),
        ("masked", "AutoModelForMaskedLM"),
        ("masked", "BertForMaskedLM"),
        ("masked", "BertModel"),
    ],
)
def test_no_random_weights_without_the_modelling_file(
    name: str, cls: str, made: dict[str, Path], ask: Callable[..., dict[str, Any]]
) -> None:
    """A loader that does not know the format raises; it never fills what it lacks with noise."""
    arguments = {"trust_remote_code": False} if cls.startswith("Auto") else {}
    reply = ask(made[name], cls, **arguments)
    assert "logits" not in reply
    assert "trust_remote_code" in reply["error"] or "size" in reply["error"]


def test_an_adapter_counts(made: dict[str, Path], ask: Callable[..., dict[str, Any]]) -> None:
    """transformers applied the adapter: without its files the logits are others."""
    with_adapter = ask(made["packed, adapter"], "AutoModelForCausalLM")["logits"]
    moved = made["packed, adapter"].parent / "moved"
    moved.mkdir()
    for path in made["packed, adapter"].glob("adapter_*"):
        path.rename(moved / path.name)
    try:
        without = ask(made["packed, adapter"], "AutoModelForCausalLM")["logits"]
    finally:
        for path in moved.iterdir():
            path.rename(made["packed, adapter"] / path.name)
    assert relative_difference(without, with_adapter) > 1e-3
