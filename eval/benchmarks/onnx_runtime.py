"""Speed, bytes, memory and logits of one model in onnxruntime, transformers and llama.cpp.

    python -m eval.benchmarks.onnx_runtime
    python -m eval.benchmarks.onnx_runtime --layers 4 --only dense-bf16,onnx-int4

Makes a random-weight Llama (353M parameters at 12 layers), rounds it with `rtn` to 8 and to 4 bits
in groups of 64, embedding and head included, and exports dense, 8-bit and 4-bit weights to ONNX and
to GGUF, which hold the same integers. In a process of its own each row shows ‖logits − those of the
same weights in float32 by transformers‖ / ‖these‖ of 128 tokens, and the growth of resident memory
as it loads and reads them (mapped files count). Then one process on one thread opens all of them,
and they take turns: 128 tokens at once, and single tokens after the first few, as llama-bench does,
and after 512.
Seconds are of the processor, medians, since others may work on the machine; the load average is
printed, and only ratios of rows mean anything. "float" rows read 32-bit activations; the others of
onnxruntime round them to 8 bits, as llama.cpp does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache

import compress
from compress.blockwise import put
from compress.export import llama, onnx_session
from compress.export.export import export
from compress.stored import Stored
from compress.verify import relative_difference
from eval.benchmarks import random_llama
from eval.benchmarks.random_llama import VOCABULARY

PROMPT = 128
FIRST, LONG = 8, 512  # tokens before those that are read one at a time
TOKENS = 24
PREFILLS = 3
SPEEDS = ("decode", "decode far", "prefill")
Step = Callable[[Tensor, int], Tensor]  # (tokens [1, length], how many came before) → logits

# name → (weights, how they run)
ROWS = {
    "dense-bf16": ("dense", "bfloat16"),
    "dense-fp32": ("dense", "float32"),
    "onnx-fp32": ("dense", "onnx"),
    "onnx-int8": ("int8", "onnx"),
    "onnx-int8-float": ("int8", "onnx float"),
    "onnx-int4": ("int4", "onnx"),
    "onnx-int4-float": ("int4", "onnx float"),
    "llama.cpp-Q8_0": ("int8", "gguf"),
    "llama.cpp-Q4_0": ("int4", "gguf"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--only", default=",".join(ROWS), help="rows, by name")
    parser.add_argument("--folder", type=Path, help="keep the models here, and use those there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        names = arguments.child.split(",")
        found = (
            held(names[0], arguments.folder) if len(names) == 1 else speeds(names, arguments.folder)
        )
        print(json.dumps(found))
        return
    names = [name for name in arguments.only.split(",") if runs(ROWS[name][1])]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        make(folder, {ROWS[name] for name in names}, arguments.layers, arguments.width)
        rows = {name: in_a_process(name, folder) for name in names}
        for name, found in in_a_process(",".join([*names, ""]), folder).items():
            rows[name] |= found
    show(rows)


def runs(how: str) -> bool:
    """Whether what is needed is installed; llama.cpp is left out where it is not."""
    return how != "gguf" or find_spec("llama_cpp") is not None


def make(folder: Path, wanted: set[tuple[str, str]], layers: int, width: int) -> None:
    """Models and exports that are not there yet, and the logits that each should give."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "dense").is_dir():
        random_llama.save(folder / "dense", width, layers, head=64)
    for weights in sorted({weights for weights, _ in wanted}):
        if not (folder / weights).is_dir():
            stage = {"use": "rtn", "bits": int(weights[-1]), "targets": ["all"]}
            compress.apply(
                {"stages": [stage]}, model=str(folder / "dense"), out=folder / weights, verify=False
            )
        expected = folder / f"{weights}.pt"
        if not expected.exists():
            model = in_float32(folder / weights)
            with torch.no_grad():
                torch.save(model(prompt()).logits, expected)
            del model
    for weights, how in sorted(wanted):
        out = exported(folder, weights, how)
        if out is not None and not out.exists():
            seconds = time.process_time()
            export(folder / weights, "gguf" if how == "gguf" else "onnx", out, verify=False)
            seconds = time.process_time() - seconds
            print(f"{out.name}: {seconds:.0f} s to export", file=sys.stderr)


def in_float32(folder: Path) -> Any:
    """The model with every weight at what it stands for; ``compress.load`` rounds to 16 bits."""
    stored = Stored(folder)
    model: Any = stored.new_skeleton()
    for name, tensor in stored.others().items():
        put(model, stored.anatomy, name, tensor.float())
    for site in stored.anatomy.sites:
        put(model, stored.anatomy, site.parameter, stored.weight(site).dense())
    return model


def exported(folder: Path, weights: str, how: str) -> Path | None:
    if how == "gguf":
        return folder / f"{weights}.gguf"
    return folder / f"{weights}-onnx" if how.startswith("onnx") else None


def prompt(length: int = PROMPT) -> Tensor:
    return (torch.arange(1, length + 1) * 7919 % VOCABULARY)[None]


def in_a_process(names: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "eval.benchmarks.onnx_runtime", "--folder", str(folder),
               "--child", names]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and not done.stdout.strip():  # llama.cpp's bindings complain at exit
        raise SystemExit(f"{names}: {done.stderr.strip().splitlines()[-1]}")
    print(done.stdout.strip(), file=sys.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def opened(name: str, folder: Path, room: int) -> tuple[Step, Path]:
    """How a row reads up to ``room`` tokens, and the file or folder that it reads."""
    weights, how = ROWS[name]
    out = exported(folder, weights, how)
    if out is None:
        return in_transformers(folder / weights, how), folder / weights
    return (in_llama_cpp(out, room) if how == "gguf" else in_onnxruntime(out, how)), out


def held(name: str, folder: Path) -> dict[str, Any]:
    """Bytes, memory and logits of one row, alone in this process."""
    process = psutil.Process()
    expected = torch.load(folder / f"{ROWS[name][0]}.pt")
    before = process.memory_info().rss
    step, file = opened(name, folder, PROMPT)
    logits = step(prompt(), 0)
    return {
        "bytes": size(file),
        "memory": process.memory_info().rss - before,
        "difference": relative_difference(logits.float().flatten(), expected.flatten()),
    }


def speeds(names: list[str], folder: Path) -> dict[str, dict[str, float]]:
    """Tokens a second of all rows, which take turns."""
    steps = {name: opened(name, folder, LONG + TOKENS)[0] for name in names if name}
    prefill: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(PREFILLS):
        for name, step in steps.items():
            prefill[name].append(timed(step, prompt(), 0))
    found = {name: {"prefill": PROMPT / median(prefill[name])} for name in steps}
    for what, first in zip(SPEEDS, (FIRST, LONG), strict=False):
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        tokens = prompt(first + TOKENS)
        for step in steps.values():
            step(tokens[:, :first], 0)
        for number in range(first, first + TOKENS):
            for name, step in steps.items():
                seconds[name].append(timed(step, tokens[:, number : number + 1], number))
        for name in steps:
            found[name][what] = 1 / median(seconds[name])
    return found


def timed(step: Step, tokens: Tensor, past: int) -> float:
    start = time.process_time()
    step(tokens, past)
    return time.process_time() - start


def size(path: Path) -> int:
    files = [path] if path.is_file() else [*path.glob("model*")]
    return sum(file.stat().st_size for file in files)


def in_transformers(folder: Path, dtype: str) -> Step:
    model = compress.load(folder, dtype=getattr(torch, dtype))
    cache = DynamicCache()

    def step(tokens: Tensor, past: int) -> Tensor:
        nonlocal cache
        cache = cache if past else DynamicCache()
        with torch.no_grad():
            return model(tokens, past_key_values=cache).logits

    return step


def in_onnxruntime(folder: Path, how: str) -> Step:
    file = folder / onnx_session.FILE
    if how == "onnx float":
        with onnx_session.unrounded(file) as copy:
            session = onnx_session.Session(copy)
    else:
        session = onnx_session.Session(file)
    cache = onnx_session.Cache()

    def step(tokens: Tensor, past: int) -> Tensor:
        nonlocal cache
        feeds = onnx_session.text_feeds(tokens, past=past)
        cache = cache if past else onnx_session.Cache()
        return session.run(feeds, cache)

    return step


def in_llama_cpp(file: Path, room: int) -> Step:
    model = llama.opened(file, room)

    def step(tokens: Tensor, past: int) -> Tensor:
        if not past:
            model.reset()
        model.eval(tokens[0].tolist())
        return torch.from_numpy(model.scores[past : past + tokens.shape[1]].copy())[None]

    return step


def show(rows: dict[str, dict[str, Any]]) -> None:
    """The table, in Markdown; ratios are to dense bfloat16 in transformers."""
    base = rows.get("dense-bf16", {})
    print(
        f"| | bytes | memory | logits | decode tok/s | × bf16 | after {LONG} | × bf16 "
        "| prefill tok/s | × bf16 |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, row in rows.items():
        ratios = [f"{row[key] / base[key]:.2f}" if base else "" for key in SPEEDS]
        print(
            f"| {name} | {row['bytes'] / 1e6:.0f} MB | {row['memory'] / 1e6:.0f} MB "
            f"| {row['difference']:.1e} | {row['decode']:.1f} | {ratios[0]} "
            f"| {row['decode far']:.1f} | {ratios[1]} | {row['prefill']:.0f} | {ratios[2]} |"
        )
    print(f"\nload average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; one thread each")


if __name__ == "__main__":
    main()
