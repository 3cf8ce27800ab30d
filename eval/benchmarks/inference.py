"""Tokens a second and resident memory of packed models, beside dense ones and llama.cpp.

    python -m eval.benchmarks.inference
    python -m eval.benchmarks.inference --width 512 --blocks 4 --rows int4 --repeats 3

Makes a Llama of random weights (312M parameters unless told otherwise, all blocks alike, so that
one of them is compressed and written as often as there are blocks) and compresses it. Every row is
measured in a process of its own, in which it takes turns with the dense bfloat16 model, on one
thread; figures are medians of processor time, ratios are medians of the turns' ratios. Memory is
what a fresh process holds after loading, reading a prompt and writing, less what it held after its
imports. Rows of
llama.cpp need llama-cpp-python; files for it come from ``compress export --to gguf``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from compress import api
from compress.checkpoint import load
from compress.errors import CompressError
from compress.export.export import export
from compress.memory import give_back
from compress.source import open_file
from compress.store import SafetensorsWriter
from eval.benchmarks import random_llama
from eval.benchmarks.random_llama import VOCABULARY
from eval.metrics.speed import take_turns, threads

FOLDERS: dict[str, list[dict[str, Any]]] = {
    "int8": [{"use": "rtn", "bits": 8, "group": "channel", "targets": ["all"]}],
    "int8-groups": [{"use": "rtn", "bits": 8, "targets": ["all"]}],
    "int4": [{"use": "rtn", "bits": 4, "targets": ["all"]}],
    "svd": [{"use": "svd", "ratio": 0.5}],
    "sparse": [{"use": "magnitude", "sparsity": 0.9}],
}
# row → folder, runtime
ROWS = {
    "dense fp32": ("dense", "float32"),
    "packed int8, a scale a row": ("int8", "packed"),
    "packed int8, groups of 64": ("int8-groups", "packed"),
    "packed int4, groups of 64": ("int4", "packed"),
    "low-rank, half of the parameters": ("svd", "packed"),
    "sparse, 90% zeros": ("sparse", "packed"),
    "depth, 3/4 of the blocks": ("depth", "bfloat16"),
    "llama.cpp Q8_0": ("int8", "llama.cpp"),
    "llama.cpp Q4_0": ("int4", "llama.cpp"),
}
Runs = dict[str, Callable[[], float]]  # what is timed → one run, in seconds


def make_folders(home: Path, width: int, blocks: int, wanted: set[str]) -> int:
    """The dense folder and the ``wanted`` ones; returns the dense model's parameters."""
    block = home / "block"
    random_llama.save(block, width, 1, head=64)
    parameters = repeat(block, home / "dense", blocks)
    if "depth" in wanted:
        repeat(block, home / "depth", blocks * 3 // 4)
    for name in FOLDERS:
        if name in wanted:
            start = time.process_time()
            api.apply({"stages": FOLDERS[name]}, model=str(block), out=home / f"{name}-block")
            repeat(home / f"{name}-block", home / name, blocks)
            say(f"made {name} in {time.process_time() - start:.0f} s")
    return parameters


def repeat(block: Path, out: Path, blocks: int) -> int:
    """A folder of one block as one of many, all the same; returns the numbers in it."""
    out.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(block / name, out)
    config = json.loads((block / "config.json").read_text())
    config["num_hidden_layers"] = blocks
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"] * blocks
    if "compressed_sites" in config:
        sites = config["compressed_sites"]
        config["compressed_sites"] = {n: s for key, s in sites.items() for n in _names(key, blocks)}
    for group in config.get("quantization_config", {}).get("config_groups", {}).values():
        group["targets"] = [n for target in group["targets"] for n in _names(target, blocks)]
    (out / "config.json").write_text(json.dumps(config))
    writer = SafetensorsWriter(out / "model.safetensors")
    file, total = open_file(block / "model.safetensors"), 0
    for key in file.keys():  # noqa: SIM118 - not a dict
        tensor = file.get_tensor(key)
        for name in _names(key, blocks):
            writer.add(name, tensor)
            total += tensor.numel()
    writer.close()
    return total


def _names(key: str, blocks: int) -> list[str]:
    """The names that a tensor or site of block 0 has in all of them."""
    if ".layers.0." not in key:
        return [key]
    return [key.replace(".layers.0.", f".layers.{i}.") for i in range(blocks)]


def opened(home: Path, folder: str, runtime: str) -> Any:
    """The model of a row."""
    if runtime == "packed":
        return load(home / folder, runtime="packed")
    if runtime == "llama.cpp":
        import llama_cpp

        return llama_cpp.Llama(
            str(home / f"{folder}.gguf"), n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=1,
            n_threads_batch=1, verbose=False,
        )  # fmt: skip
    return load(home / folder, dtype=getattr(torch, runtime))


def runs(model: Any, prompt: int, steps: int) -> Runs:
    """Reading a prompt, and writing ``steps`` tokens after a short one."""
    tokens = torch.randint(2, VOCABULARY, (1, prompt), generator=torch.Generator().manual_seed(0))

    def read() -> float:
        start = time.process_time()
        if isinstance(model, transformers.PreTrainedModel):
            model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        else:
            model.reset()
            model.eval(tokens[0].tolist())
        return time.process_time() - start

    def write() -> float:
        if not isinstance(model, transformers.PreTrainedModel):
            model.reset()
            model.eval(tokens[0, :32].tolist())
            start = time.process_time()
            for token in tokens[0, :steps].tolist():
                model.eval([token])
            return time.process_time() - start
        cache = model(input_ids=tokens[:, :32], use_cache=True).past_key_values
        start = time.process_time()
        for i in range(steps):
            cache = model(input_ids=tokens[:, i : i + 1], past_key_values=cache).past_key_values
        return time.process_time() - start

    return {"decode": write, "prefill": read}


def compare(home: Path, row: str, prompt: int, steps: int, repeats: int) -> dict[str, Any]:
    """Tokens a second of a row, and its ratios to dense bfloat16 in the same process."""
    models = {"row": opened(home, *ROWS[row]), "dense": opened(home, "dense", "bfloat16")}
    found: dict[str, Any] = {}
    report = getattr(models["row"], "packed_report", None)
    if report:
        found["report"] = report.lines()
    with threads(1), torch.inference_mode():
        timed = {name: runs(model, prompt, steps) for name, model in models.items()}
        for what, tokens in (("decode", steps), ("prefill", prompt)):
            turns = repeats if what == "decode" else min(repeats, 3)
            seconds = take_turns({name: each[what] for name, each in timed.items()}, turns)
            pairs = zip(seconds["dense"], seconds["row"], strict=True)
            found[what] = tokens / statistics.median(seconds["row"])
            found[f"dense {what}"] = tokens / statistics.median(seconds["dense"])
            found[f"{what} ratio"] = statistics.median(d / r for d, r in pairs)
    return found


def memory(home: Path, folder: str, runtime: str, prompt: int) -> dict[str, int]:
    """Bytes held after loading and running, beyond those held after the imports."""
    if runtime == "llama.cpp":
        import llama_cpp  # noqa: F401 - before counting starts
    getattr(transformers, "LlamaForCausalLM")  # noqa: B009 - imports the model's code
    import compress.runtime.packed  # noqa: F401

    process = psutil.Process()
    before = process.memory_info().rss
    with threads(1), torch.inference_mode():
        for run in runs(opened(home, folder, runtime), prompt, 8).values():
            run()
        give_back()
        return {"held": process.memory_info().rss - before, "imports": before}


def child(home: Path, task: dict[str, Any]) -> dict[str, Any]:
    """The answer of a fresh process that does one ``task``."""
    done = subprocess.run(
        [sys.executable, "-m", "eval.benchmarks.inference", "--child", json.dumps(task), str(home)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it was killed"])[-1][:150]}
    return json.loads(done.stdout.splitlines()[-1])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=1024, help="hidden size; a multiple of 64")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=8, help="tokens written")
    parser.add_argument("--repeats", type=int, default=5, help="turns of writing; of reading, 3")
    parser.add_argument("--rows", nargs="+", help="rows whose name contains one of these")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        task, home = json.loads(options.child[0]), Path(options.child[1])
        do = compare if task.pop("do") == "compare" else memory
        print(json.dumps(do(home, **task)))
        return
    rows = [r for r in ROWS if not options.rows or any(part in r for part in options.rows)]
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        parameters = make_folders(home, options.width, options.blocks, {ROWS[r][0] for r in rows})
        print(f"{parameters / 1e6:.0f}M parameters; prompts of {options.prompt} tokens; one thread")
        print(f"load of the machine when it began: {os.getloadavg()[0]:.1f}\n")
        print("| | decode, tokens/s | of dense bf16 | prefill, tokens/s | of dense bf16 | held |")
        print("|---|---:|---:|---:|---:|---:|", flush=True)
        notes = measured(home, rows, options)
        print(f"\nload of the machine at the end: {os.getloadavg()[0]:.1f}")
        for name, lines in notes.items():
            print(f"\n{name}: " + "; ".join(lines))


def measured(home: Path, rows: list[str], options: argparse.Namespace) -> dict[str, list[str]]:
    """Print a line for each row; returns what the packed ones say of themselves."""
    notes, speeds = {}, []
    dense = child(
        home, {"do": "memory", "folder": "dense", "runtime": "bfloat16", "prompt": options.prompt}
    )["held"]
    for row in rows:
        folder, runtime = ROWS[row]
        reason = exported(home, folder) if runtime == "llama.cpp" else None
        if reason:
            print(f"| {row} | {reason} | | | | |", flush=True)
            continue
        found = child(
            home,
            {"do": "compare", "row": row, "prompt": options.prompt, "steps": options.steps,
             "repeats": options.repeats},
        )  # fmt: skip
        held = child(
            home, {"do": "memory", "folder": folder, "runtime": runtime, "prompt": options.prompt}
        )
        if "error" in found or "error" in held:
            print(f"| {row} | {found.get('error') or held.get('error')} | | | | |", flush=True)
            continue
        speeds.append((found["dense decode"], found["dense prefill"]))
        notes[row] = found.get("report", [])
        print(
            f"| {row} | {found['decode']:.1f} | {found['decode ratio']:.2f} | "
            f"{found['prefill']:.0f} | {found['prefill ratio']:.2f} | "
            f"{held['held'] / 1e6:.0f} MB, {held['held'] / dense:.0%} |",
            flush=True,
        )
    if speeds:
        decode, prefill = (statistics.median(each) for each in zip(*speeds, strict=True))
        print(f"| dense bf16 | {decode:.1f} | 1 | {prefill:.0f} | 1 | {dense / 1e6:.0f} MB |")
    return {row: found for row, found in notes.items() if found}


def exported(home: Path, folder: str) -> str | None:
    """Write ``folder`` as a GGUF file; why there is none, if so."""
    if not find_spec("llama_cpp"):
        return "llama-cpp-python is not installed"
    try:
        export(home / folder, "gguf", home / f"{folder}.gguf", verify=False)
    except CompressError as error:
        return f"compress export refuses: {error}"
    return None


if __name__ == "__main__":
    main()
