"""Two small classifiers, taught here, compressed, and measured by the accuracy of ``evaluate``.

    python -m eval.benchmarks.classifiers runs/classifiers
    python -m eval.benchmarks.classifiers runs/classifiers --accuracy accuracy

A BERT-like one reads lines of Python and says whether the next one is further in, as far, or
further out; it learns from calibration documents of ``data: demo`` and is asked about evaluation
documents. A ViT-like one says which of eight ways the stripes of a noisy picture run. 1,000 rows
each. ``--accuracy`` names a metric of ``evaluate``, or a local script of one: without it, one is
written that counts as ``accuracy`` of the hub does, so that no network is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor

import compress
from compress.checkpoint import load_tokenizer
from compress.data import Part, documents
from compress.source import DEMO
from eval.compare import paired
from eval.harness import evaluate
from eval.results import Result

ROWS = 1000
LINES = 4  # that are read before the next
TOKENS = 64
WAYS = 8
STAGES: dict[str, dict[str, Any]] = {
    "int8": {"use": "int8"},
    "rtn, 4 bits": {"use": "rtn", "bits": 4},
    "rtn, 3 bits": {"use": "rtn", "bits": 3},
    "gptq, 3 bits": {"use": "gptq", "bits": 3},
    "rtn, 2 bits": {"use": "rtn", "bits": 2},
    "gptq, 2 bits": {"use": "gptq", "bits": 2},
    "magnitude, 50%": {"use": "magnitude", "sparsity": 0.5},
    "magnitude, 80%": {"use": "magnitude", "sparsity": 0.8},
    "svd, half": {"use": "svd", "ratio": 0.5},
}
SCRIPT = """
import datasets
import evaluate


class Score(evaluate.Metric):
    def _info(self):
        kinds = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=datasets.Features(kinds)
        )

    def _compute(self, predictions, references, of=1):
        pairs = list(zip(predictions, references))
        right = sum(p == r for p, r in pairs)
        hits = sum(p == r == of for p, r in pairs)
        either = sum((p == of) + (r == of) for p, r in pairs)
        first = {"accuracy": right / len(pairs)}
        return {"f1": 2 * hits / either, **first} if NAME == "f1" else first


NAME = "%s"
"""


@cache
def files(part: Part) -> list[list[str]]:
    """Lines that are not blank, of documents with enough of them."""
    found = (
        [line for line in d.read().splitlines() if line.strip()] for d in documents("demo", part)
    )
    return [lines for lines in found if len(lines) > 4 * LINES]


def steps_in(count: int, seed: int, part: Part) -> list[dict[str, Any]]:
    """``count`` rows: some lines of Python, and which way the next goes; each way as often."""
    draw, ways = random.Random(seed), ("in", "level", "out")
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        lines = draw.choice(files(part))
        end = draw.randrange(LINES, len(lines))
        before, after = (len(line) - len(line.lstrip()) for line in lines[end - 1 : end + 1])
        kind = 0 if after > before else 1 if after == before else 2
        if kind == len(rows) % 3:
            text = "\n".join(lines[end - LINES : end])
            rows.append({"text": text, "label": kind, "way": ways[kind]})
    return rows


def stripes(count: int, seed: int) -> tuple[Tensor, list[int]]:
    """[count, 3, 32, 32]: stripes that run one of ``WAYS`` ways, under noise."""
    noise = torch.Generator().manual_seed(seed)
    labels = torch.randint(WAYS, (count,), generator=noise)
    phase, width = torch.rand(2, count, 1, 1, generator=noise)
    angle = (labels * math.pi / WAYS)[:, None, None]
    down, across = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    along = across * angle.cos() + down * angle.sin()
    waves = (along * (0.6 + 0.6 * width) + 2 * math.pi * phase).sin()
    images = waves[:, None] + 5.0 * torch.randn(count, 3, 32, 32, generator=noise)
    return images, labels.tolist()


def taught(model: Any, batch: Callable[[int], dict[str, Tensor]], steps: int) -> Any:
    """The model after ``steps`` of AdamW with warm-up and decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    for step in range(steps):
        loss = model.train()(**batch(step)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def make_text(out: Path) -> None:
    tokenizer: Any = load_tokenizer(DEMO)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = TOKENS
    tokenizer.truncation_side = "left"

    def batch(step: int) -> dict[str, Tensor]:
        rows = steps_in(64, step, "calibration")
        coded = tokenizer(
            [row["text"] for row in rows], padding=True, truncation=True, return_tensors="pt"
        )
        names = ("input_ids", "attention_mask")
        return {name: coded[name] for name in names} | {
            "labels": torch.tensor([row["label"] for row in rows])
        }

    torch.manual_seed(0)
    config: Any = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=512, max_position_embeddings=TOKENS,
    )  # fmt: skip
    config.num_labels = 3
    model = taught(transformers.BertForSequenceClassification(config), batch, 1000)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    rows = steps_in(ROWS, 10_000, "evaluation")
    out.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_pictures(out: Path) -> None:
    def batch(step: int) -> dict[str, Tensor]:
        images, labels = stripes(64, step)
        return {"pixel_values": images, "labels": torch.tensor(labels)}

    torch.manual_seed(0)
    config: Any = transformers.ViTConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        image_size=32, patch_size=8,
    )  # fmt: skip
    config.num_labels = WAYS
    taught(transformers.ViTForImageClassification(config), batch, 600).save_pretrained(out)
    images, labels = stripes(ROWS, 10_000)
    rows = datasets.Dataset.from_dict({"pixel_values": images.tolist(), "label": labels})
    rows.save_to_disk(out.with_suffix(".rows"))


def measured(folder: Path, rows: Path, model: Path, accuracy: str) -> dict[str, Result]:
    metrics = [accuracy, "accuracy", "kl", "top1_agreement", "size_bytes"]
    found = evaluate([str(folder)], metrics, dataset=str(rows), baseline=str(model))
    return {row.metric: row for row in found if isinstance(row, Result)}


def compare(model: Path, rows: Path, accuracy: str, calibration: dict[str, Any]) -> None:
    original = measured(model, rows, model, accuracy)
    size = original["size_bytes"].value or math.nan
    dense = original[accuracy]
    print(f"\n{model.name}: accuracy {dense.value} ± {dense.stderr or 0:.4f}, {size:,.0f} bytes\n")
    print("| | accuracy | ours | difference, 95% | verdict | KL | agree | bytes |")
    print("|---|---:|---:|---:|---|---:|---:|---:|")
    for name, stage in STAGES.items():
        out = model.with_name(f"{model.name}-{name.replace(', ', '-').replace(' ', '-')}")
        shutil.rmtree(out, ignore_errors=True)
        recipe = {"stages": [stage]} | calibration
        try:
            compress.apply(recipe, model=str(model), out=out, verify=False)
        except compress.errors.CompressError as error:
            print(f"| {name} | not possible: {error} |", flush=True)
            continue
        found = measured(out, rows, model, accuracy)
        value = {name: row.value or 0.0 for name, row in found.items()}
        d = paired(found[accuracy], dense)
        print(
            f"| {name} | {value[accuracy]} | {value['accuracy']} | {d.mean:+.3f} "
            f"({d.low:+.3f} to {d.high:+.3f}) | {d.words} | {value['kl']:.2g} | "
            f"{value['top1_agreement']:.3f} | {value['size_bytes'] / size:.0%} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--accuracy", help="a metric of `evaluate`, or a script of one")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.accuracy is None:
        (out / "accuracy.py").write_text(SCRIPT % "accuracy")
    accuracy = f"evaluate:{options.accuracy or out / 'accuracy.py'}"
    bert, vit = out / "bert-like", out / "vit-like"
    if not bert.with_suffix(".jsonl").exists():
        make_text(bert)
    if not vit.with_suffix(".rows").exists():
        make_pictures(vit)
    text = out / "text.jsonl"
    lines = steps_in(4000, 777, "calibration")
    text.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in lines))
    compare(bert, bert.with_suffix(".jsonl"), accuracy, {"calibration": {
        "data": str(text), "samples": 64, "length": TOKENS,
    }})  # fmt: skip
    compare(vit, vit.with_suffix(".rows"), accuracy, {})


if __name__ == "__main__":
    main()
