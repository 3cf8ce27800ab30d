"""Our numbers beside those that lm-evaluation-harness gets by itself on the same folder.

    python -m eval.benchmarks.beside_lm_eval runs/beside-lm-eval

The demo model, dense and in 4 bits by ``gptq``. Tasks: as `compress eval` measures them, lm-eval
on the model in memory, and its own command on the folder. Perplexity of 32 texts of 255 tokens:
ours, a loop over places in float64, and lm-eval's ``loglikelihood_rolling``, whose softmax is of
the model's dtype unless it is told otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

import compress
from compress import checkpoint
from compress.data import Windows, documents
from compress.source import DEMO
from eval import demo_tasks
from eval.harness import evaluate
from eval.metrics.base import Context
from eval.metrics.quality import Perplexity
from eval.results import Result

QUESTIONS = 60
TEXTS, LENGTH = 32, 256  # of which the first token is the end-of-text token, and not predicted


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    dense, small = out / "dense", out / "gptq-4"
    if not dense.exists():
        shutil.copytree(DEMO, dense, ignore=shutil.ignore_patterns("results.jsonl"))
    if not small.exists():
        calibration = {"data": "demo", "samples": 32}
        recipe = {"stages": [{"use": "gptq", "bits": 4}], "calibration": calibration}
        compress.apply(recipe, model="demo", out=small, verify=False)
    names = [file.stem for file in demo_tasks.write(out / "tasks")]
    for folder in (dense, small):
        tasks(folder, names, out / "tasks")
    texts = rolling(out / "rolling")
    for folder in (dense, small):
        for dtype in (torch.float32, torch.bfloat16):
            perplexities(folder, dtype, texts, out / "rolling")


def tasks(folder: Path, names: list[str], where: Path) -> None:
    rows = evaluate([str(folder)], [], tasks=names, limit=QUESTIONS)
    ours = {row.metric: row for row in rows if isinstance(row, Result)}
    model = HFLM(
        checkpoint.load(folder), tokenizer=checkpoint.load_tokenizer(folder), batch_size=16
    )
    memory = simple(model, names, where, limit=QUESTIONS)
    itself = command(folder, names, where)
    for name in names:
        row = ours[f"task:{name}"]
        print(f"{folder.name}, {name}, {len(row.samples or ())} questions")
        print(f"  ours               {row.value!r} ± {row.stderr!r}")
        for words, found in (("lm-eval in memory", memory), ("lm_eval command", itself)):
            print(f"  {words:<19}{found[name]['acc,none']!r} ± {found[name]['acc_stderr,none']!r}")


def simple(model: Any, names: list[str], where: Path, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(where), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, **options)
    return found["results"]


def command(folder: Path, names: list[str], where: Path) -> dict[str, Any]:
    """What lm-eval's own command writes; it sees the folder only."""
    out = where / f"results-{folder.name}"
    shutil.rmtree(out, ignore_errors=True)
    arguments = {
        "--model": "hf", "--model_args": f"pretrained={folder},dtype=auto", "--device": "cpu",
        "--batch_size": "16", "--include_path": str(where), "--tasks": ",".join(names),
        "--output_path": str(out), "--limit": str(QUESTIONS),
    }  # fmt: skip
    words = [word for pair in arguments.items() for word in pair]
    subprocess.run([sys.executable, "-m", "lm_eval", *words], check=True, capture_output=True)
    return json.loads(next(out.rglob("results*.json")).read_text())["results"]


def rolling(where: Path) -> list[str]:
    """Texts of held-out documents that are LENGTH − 1 tokens, written as a task of lm-eval."""
    tokenizer: Any = checkpoint.load_tokenizer(DEMO)
    texts: list[str] = []
    for document in documents("demo", "evaluation"):
        tokens = tokenizer(document.read(), add_special_tokens=False)["input_ids"]
        for start in range(0, len(tokens) - LENGTH, LENGTH):
            text = tokenizer.decode(tokens[start : start + LENGTH - 1])
            if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == LENGTH - 1:
                texts.append(text)
        if len(texts) >= TEXTS:
            break
    where.mkdir(exist_ok=True)
    lines = where / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:TEXTS]))
    task = {
        "task": "rolling", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(lines.resolve())}},
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }  # fmt: skip
    (where / "rolling.yaml").write_text(yaml.safe_dump(task))
    return texts[:TEXTS]


def perplexities(folder: Path, dtype: torch.dtype, texts: list[str], where: Path) -> None:
    tokenizer: Any = checkpoint.load_tokenizer(folder)
    coded = tokenizer(texts, add_special_tokens=False, return_tensors="pt")["input_ids"]
    tokens = torch.cat([torch.full((len(coded), 1), tokenizer.eos_token_id), coded], dim=1)
    given = Context(str(folder))
    given.windows = Windows(tokens, torch.ones_like(tokens), "texts", "evaluation", "")
    model: Any = given.model
    model.to(dtype)
    print(f"{folder.name}, {dtype}, {len(tokens)} texts of {LENGTH - 1} tokens: perplexity")
    print(f"  ours                         {Perplexity().measure(given).value!r}")
    print(f"  by hand                      {by_hand(model, tokens)!r}")
    letters = sum(len(text.encode()) for text in texts)
    for softmax in (None, "float32"):
        theirs = HFLM(str(folder), dtype=dtype, device="cpu", batch_size=16, softmax_dtype=softmax)
        theirs.model.to(dtype)  # compressed folders say their own
        found = simple(theirs, ["rolling"], where, bootstrap_iters=0)
        per_byte = found["rolling"]["byte_perplexity,none"]
        words = "lm-eval" if softmax is None else f"lm-eval, softmax in {softmax}"
        print(f"  {words:<29}{per_byte ** (letters / coded.numel())!r}", flush=True)


@torch.no_grad()
def by_hand(model: Any, tokens: Tensor) -> float:
    total = 0.0
    for row in tokens:
        chances = model(row[None]).logits[0].double().log_softmax(-1)
        for place in range(1, len(row)):
            total -= chances[place - 1, row[place]].item()
    return math.exp(total / (tokens.numel() - len(tokens)))


if __name__ == "__main__":
    main()
