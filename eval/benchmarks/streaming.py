"""Seconds and peak memory of `compress apply` against model size: does memory grow with depth?

    python -m eval.benchmarks.streaming --out streaming.json
    python -m eval.benchmarks.streaming --methods gptq --width 512 --depths 160 --limit 800

Makes random-weight Llama folders of one width and three depths (about 0.1, 0.3 and 0.8 GB in
bfloat16), and applies `rtn`, `svd` and `gptq` (on 16 windows of 256 tokens of the demo text) to
each in a process of its own, on one thread. Memory is the process' anonymous memory (RssAnon of
/proc/self/status, sampled): pages of mapped files, which the kernel drops when it needs room, do
not count; the peak of all resident pages is printed too. With ``--limit`` each process is in a
control group of so many MB, all of its pages counted, and is killed if it needs more (Linux, root).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from compress.store import SafetensorsWriter
from eval.benchmarks import random_llama
from eval.benchmarks.random_llama import VOCABULARY

DEPTHS = (4, 12, 32)
STAGES: dict[str, dict[str, Any]] = {
    "rtn": {"use": "rtn", "bits": 4},
    "svd": {"use": "svd", "ratio": 0.5},
    "gptq": {"use": "gptq", "bits": 4},
}

# Runs in the measured process: everything is imported first, then memory is sampled.
CHILD = """
import json, resource, sys, threading, time
import torch
import compress.run, compress.recipe, compress.compressors.lowrank.svd
import compress.compressors.quantization.gptq
from pathlib import Path
from typing import Any

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

torch.set_num_threads(1)
recipe = compress.recipe.load_one(json.loads(sys.argv[1]))
before, peak, stop = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.005)

thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
seconds = None
for event in compress.run.run(recipe, Path(sys.argv[2]), verify=False):
    if event.label == "check" and event.done == 1:
        seconds = time.perf_counter() - start
stop.set()
thread.join()
resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "memory": peak - before, "resident": resident}))
"""


def make_model(folder: Path, depth: int, width: int) -> int:
    """A Llama of ``depth`` random blocks, written tensor by tensor; returns its bytes."""
    config = random_llama.config(width, depth, head=width // 16, tie_word_embeddings=True)
    feed = config.intermediate_size
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    random_llama.copy_tokenizer(folder)
    writer = SafetensorsWriter(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)

    def add(name: str, *shape: int) -> None:
        matrix = len(shape) > 1
        tensor = torch.randn(shape, generator=generator) * 0.02 if matrix else torch.ones(shape)
        writer.add(name, tensor.to(torch.bfloat16))

    add("model.embed_tokens.weight", VOCABULARY, width)
    add("model.norm.weight", width)
    for i in range(depth):
        start = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            add(f"{start}.self_attn.{name}.weight", width, width)
        add(f"{start}.mlp.gate_proj.weight", feed, width)
        add(f"{start}.mlp.up_proj.weight", feed, width)
        add(f"{start}.mlp.down_proj.weight", width, feed)
        add(f"{start}.input_layernorm.weight", width)
        add(f"{start}.post_attention_layernorm.weight", width)
    writer.close()
    return (folder / "model.safetensors").stat().st_size


@contextmanager
def control_group(limit: int | None) -> Iterator[Path | None]:
    """A new control group whose processes may hold ``limit`` bytes together; None: none."""
    if limit is None:
        yield None
        return
    old = Path("/sys/fs/cgroup/memory")  # version 1 of the file system
    root, name = (old, "memory.limit_in_bytes") if old.is_dir() else (old.parent, "memory.max")
    group = root / f"compresskit-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(limit))
    except OSError as error:
        sys.exit(f"--limit makes a control group under {root}, which needs root: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def measure(
    model: Path, stage: dict[str, object], out: Path, group: Path | None
) -> dict[str, float]:
    recipe: dict[str, Any] = {"model": str(model), "stages": [stage]}
    if stage["use"] == "gptq":
        recipe["calibration"] = {"data": "demo", "samples": 16, "length": 256}
    enter = f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
    done = subprocess.run(
        [sys.executable, "-c", (enter if group else "") + CHILD, json.dumps(recipe), str(out)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{stage['use']} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="numbers of blocks")
    parser.add_argument("--methods", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--width", type=int, default=1024, help="hidden size")
    parser.add_argument("--limit", type=int, help="MB that a process may hold")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    rows = []
    titles = ("blocks", "model", "seconds", "s/GB", "memory", "resident")
    print(f"{'method':<8}" + "".join(f"{title:>10}" for title in titles))
    limit = options.limit and options.limit * 1_000_000
    with tempfile.TemporaryDirectory() as home, control_group(limit) as group:
        for depth in options.depths:
            model = Path(home, f"model-{depth}")
            size = make_model(model, depth, options.width)
            for method in options.methods:
                row = {"method": method, "blocks": depth, "bytes": size}
                row |= measure(model, STAGES[method], Path(home, f"{method}-{depth}"), group)
                rows.append(row)
                cells = (
                    f"{depth}", f"{size / 1e6:.0f} MB", f"{row['seconds']:.1f}",
                    f"{row['seconds'] / size * 1e9:.0f}", f"{row['memory'] / 1e6:.0f} MB",
                    f"{row['resident'] / 1e6:.0f} MB",
                )  # fmt: skip
                print(f"{method:<8}" + "".join(f"{cell:>10}" for cell in cells), flush=True)
    for method in options.methods:
        memory = [row["memory"] for row in rows if row["method"] == method]
        print(f"{method}: {options.depths[-1] / options.depths[0]:.0f} times the blocks take "
              f"{memory[-1] / memory[0]:.2f} times the memory")  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
