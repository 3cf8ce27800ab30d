"""Exports of the demo model: what each format holds, its bytes, and what llama.cpp makes of it.

    python -m eval.benchmarks.exports runs/exports

The first table has every checkpoint in every format that can hold it, with the relative difference
of the logits to the folder's, by what reads it, by llama.cpp, and by onnxruntime with 8-bit
activations. The second (needs llama-cpp-python) has nll on evaluation text by
llama.cpp and by this library, on the same tokens, and beside ours the files that llama.cpp makes of
the dense model itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import recipe as recipes
from compress import registry
from compress import run as runs
from compress.checkpoint import load, load_tokenizer
from compress.data import Windows, windows
from compress.errors import CheckpointError
from compress.export import llama
from compress.export.export import export

CHECKPOINTS: dict[str, list[dict[str, Any]]] = {
    "rtn-4": [{"use": "rtn", "bits": 4}],
    "rtn-8": [{"use": "rtn", "bits": 8}],
    "gptq-4": [{"use": "gptq", "bits": 4}],
    "gptq-8": [{"use": "gptq", "bits": 8}],
    "gptq-4-all-32": [{"use": "gptq", "bits": 4, "group": 32, "targets": ["all"]}],
    "gptq-5-all-32": [{"use": "gptq", "bits": 5, "group": 32, "targets": ["all"]}],
    "w8a8": [{"use": "w8a8"}],
    "fp8": [{"use": "fp8", "activations": True}],
    "svd-80": [{"use": "svd", "ratio": 0.8}],
    "depth-83": [{"use": "depth", "amount": 0.17}],
}
OWN_TYPES = ("Q8_0", "Q4_0", "Q4_K_M")
SAMPLES, LENGTH = 128, 256


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("out", type=Path)
    out: Path = arguments.parse_args().out
    folders = {"dense": "demo"}
    for name, stages in CHECKPOINTS.items():
        folder = out / name
        if not folder.exists():
            asked = {"model": "demo", "calibration": {"data": "demo"}, "stages": stages}
            runs.apply(recipes.load_one(asked), folder)
        folders[name] = str(folder)
    held(folders, out)
    compared(folders, out)


def held(folders: dict[str, str], out: Path) -> None:
    """Every checkpoint in every format."""
    print("| checkpoint | format | bytes | held | logits, relative | by other readers | vLLM |")
    print("|---|---|---:|---|---:|---:|---|")
    for name, folder in folders.items():
        for to in registry.available(registry.EXPORTERS):
            place = out / "exports" / f"{name}-{to}{'.gguf' if to == 'gguf' else ''}"
            place.parent.mkdir(exist_ok=True)
            try:
                made = export(folder, to, place, overwrite=True)
            except CheckpointError as error:
                print(f"| {name} | {to} | | {str(error).partition(': ')[2]} | | | |", flush=True)
                continue
            said = ", ".join(f"{count} {how}" for how, count in made["held"].items())
            others = made.get("differences", {}).values()
            print(f"| {name} | {to} | {made['bytes']:,} | {said} | {made['difference']:.1e} "
                  f"| {', '.join(f'{x:.1e}' for x in others)} | {made.get('vllm', '')} |",
                  flush=True)  # fmt: skip


def compared(folders: dict[str, str], out: Path) -> None:
    """llama.cpp's nll beside ours, and beside files that llama.cpp quantized."""
    text = windows("demo", load_tokenizer("demo"), part="evaluation", samples=SAMPLES,
                   length=LENGTH, seed=0)  # fmt: skip
    base = by_library(folders["dense"], text)
    dense = out / "exports" / "dense-gguf.gguf"
    files = {name: out / "exports" / f"{name}-gguf.gguf" for name in folders}
    for kind in OWN_TYPES:
        files[f"llama.cpp's {kind}"] = out / "exports" / f"own-{kind}.gguf"
        llama.quantized(dense, files[f"llama.cpp's {kind}"], kind)
    print("\n| model | GGUF bytes | nll here | by llama.cpp | difference | llama.cpp − original |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, file in files.items():
        if not file.exists():
            continue
        there = losses(llama.logits(file, text.tokens), text.tokens)
        here = by_library(folders.get(name, str(file)), text)
        print(f"| {name} | {file.stat().st_size:,} | {here.mean():.4f} | {there.mean():.4f} "
              f"| {paired(there - here)} | {paired(there - base)} |", flush=True)  # fmt: skip


def by_library(folder: str, text: Windows) -> Tensor:
    """float64 [windows]: mean nll of a window, by ``load(folder)`` in its own dtype's float32."""
    model: Any = load(folder, dtype=torch.float32)
    with torch.no_grad():
        return torch.cat([losses(model(row[None]).logits, row[None]) for row in text.tokens])


def losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """float64 [windows]: mean nll of tokens int64 [windows, length] after the first."""
    flat = logits[:, :-1].double().flatten(0, 1)
    each = torch.nn.functional.cross_entropy(flat, tokens[:, 1:].flatten(), reduction="none")
    return each.view(len(tokens), -1).mean(1)


def paired(difference: Tensor) -> str:
    error = difference.std() / len(difference) ** 0.5
    return f"{difference.mean():+.5f} ± {error:.5f}"


if __name__ == "__main__":
    main()
