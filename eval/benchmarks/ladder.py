"""Train the demo architecture at several sizes on the same tokens: a ruler for scaling laws.

    python -m eval.benchmarks.ladder runs/ladder --steps 12000

Every size reads the same windows of text in the same order, by the same recipe: AdamW, warm-up,
cosine decay, a learning rate that falls with the square root of the width. Of several ``--rates``
each size keeps the one with the lowest loss on training text held out: a ruler is made of models
that are each as good as they get. Seeds change nothing but the initial weights. Each model is then
measured by the project's own ``nll`` on the demo text, as ``compress eval`` does, and its row, with
parameters, tokens, seed and settings in ``detail``, goes into ``OUT/ladder.jsonl``. A model that is
done is kept; one that was interrupted goes on.

The text is Python source of the packages that are installed here under permissive licences, at most
two million letters of one, without any file of which a tenth of the lines stand in the standard
library too: the demo text, which is the standard library, remains held out. Other packages are
another text; rows carry its hash.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.checkpoint import load_tokenizer
from compress.data import Windows, windows
from compress.errors import DataError
from compress.source import DEMO
from compress.training import Schedule, Trainer
from eval.benchmarks.second_model import NextToken
from eval.harness import evaluate
from eval.metrics.size import count_parameters
from eval.results import Result

LENGTH, BATCH, HELD = 256, 4, 64  # tokens; windows a step; windows to watch the training by
SIZES = ((32, 3), (40, 4), (48, 4), (64, 5), (96, 5), (128, 6), (192, 6), (256, 8))  # width, blocks
RATES = (3e-3, 1.5e-3)  # at the demo model's width of 128
PERMISSIVE = re.compile(r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation)\b")
BUNDLES = {"compresskit", "pip", "setuptools"}  # ourselves; what holds other projects' files
SHARE = 2_000_000  # letters of one package at most
FILES = 400  # of one package at most, spread over it
FOUND = 0.1  # share of a file's lines that may stand in the standard library


def sources() -> Iterator[str]:
    """The Python files to learn from."""
    known = _library_lines()
    for package in sorted(distributions(), key=lambda d: d.metadata["Name"].lower()):
        if package.metadata["Name"] in BUNDLES or not _permissive(package):
            continue
        left = SHARE
        files = sorted(str(f) for f in package.files or [] if f.suffix == ".py")
        for name in files[:: max(1, len(files) // FILES)]:
            path = Path(str(package.locate_file(name)))
            text = path.read_text(errors="replace") if path.is_file() else ""
            lines = _lines(text)
            if 0 < len(text) < left and len(lines & known) <= FOUND * len(lines):
                left -= len(text)
                yield text


def _permissive(package: Distribution) -> bool:
    """Whether everything that the package says of its licence is permissive."""
    meta = package.metadata
    said = meta.get_all("License-Expression") or []
    if not said:
        named = [s for s in meta.get_all("Classifier") or [] if s.startswith("License ::")]
        said = [s for s in named if s != "License :: OSI Approved"]
    if not said:
        said = [text[:80] for text in meta.get_all("License") or ["none"]]
    return all(PERMISSIVE.search(s) and not re.search("MPL|GPL|Mozilla", s) for s in said)


def _library_lines() -> set[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found: set[str] = set()
    for path in root.rglob("*.py"):
        if not {"site-packages", "dist-packages"} & set(path.parts):
            found |= _lines(path.read_text(errors="replace"))
    return found


def _lines(text: str) -> set[str]:
    """Lines that would not stand in two files by chance."""
    return {line for line in map(str.strip, text.splitlines()) if len(line) > 30}


def read(tokenizer: Any, samples: int) -> Windows:
    """``samples`` windows of 256 tokens; which ones, and their order, hashes of the text decide."""
    with tempfile.TemporaryDirectory() as copies:
        for number, text in enumerate(sources()):
            Path(copies, f"{number}.txt").write_text(text)
        found = windows(copies, tokenizer, part="calibration", samples=samples, length=LENGTH)
    if len(found) < samples:
        raise DataError(
            f"the packages installed here give {len(found)} windows, not {samples}; fewer --steps"
        )
    return found


def configuration(width: int, blocks: int) -> LlamaConfig:
    """The demo model's, with another width and depth."""
    return LlamaConfig(
        **json.loads((DEMO / "config.json").read_text())
        | {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": blocks,
           "head_dim": width // 4}
    )  # fmt: skip


def train(
    out: Path, size: tuple[int, int], seed: int, rate: float, text: Windows, tokenizer: Any
) -> float:
    """Train one size from the initial weights of ``seed``, save it in ``out`` with its settings.

    What is there already is kept. Returns the loss on training text held out, nats/token.
    """
    record = out / "training.json"
    if record.exists():
        return json.loads(record.read_text())["held_out"]

    def report(step: int, steps: int, numbers: dict[str, float]) -> None:
        if "held" in numbers:
            print(f"{out.name}: step {step} of {steps}, held-out {numbers['held']:.4f}", flush=True)

    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(configuration(*size)).float()
    work = out.with_name(f".{out.name}")  # its state, should it be interrupted
    recipe = schedule(size[0], rate, len(text))
    trainer = Trainer(
        NextToken(model), recipe, seed=0, folder=work, report=report, precision="bfloat16",
        length=LENGTH,
    )  # fmt: skip
    found = trainer.fit(text.tokens[:-HELD], text.tokens[-HELD:])
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    held = found["held_out_loss"]["best"]
    record.write_text(json.dumps({"held_out": held, "schedule": asdict(recipe)}))
    shutil.rmtree(work)
    return held


def schedule(width: int, rate: float, count: int) -> Schedule:
    """One epoch of ``count`` windows, those held out aside; never stopped early."""
    steps = (count - HELD) // BATCH
    rate = round(rate * math.sqrt(128 / width), 6)
    return Schedule(steps, rate, BATCH, weight_decay=0.1, check_every=320, patience=steps)


def measure(
    out: Path, size: tuple[int, int], seed: int, tried: list[float], text: Windows
) -> Result:
    """The nll of one size on the demo text, and how it was made."""
    found = evaluate([str(out)], ["nll"], data="demo", samples=128, length=LENGTH)
    (row,) = (event for event in found if isinstance(event, Result))
    made = json.loads((out / "training.json").read_text())
    detail = {
        "parameters": count_parameters(out),
        "width": size[0],
        "blocks": size[1],
        "tokens": made["schedule"]["steps"] * BATCH * LENGTH,
        "seed": seed,
        "rates": tried,
        **made,
        "text": text.describe() | {"name": "installed Python packages", "part": "training"},
    }
    samples = [round(value, 5) for value in row.samples]
    return row.model_copy(update={"checkpoint": out.name, "samples": samples, "detail": detail})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1280, help=f"of {BATCH * LENGTH} tokens")
    parser.add_argument("--seeds", type=int, default=1, help="models of each size")
    parser.add_argument("--sizes", nargs="*", default=SIZES, type=_size, help="e.g. 128x6")
    parser.add_argument("--rates", nargs="*", default=RATES, type=float, help="at width 128")
    options = parser.parse_args()
    tokenizer: Any = load_tokenizer(DEMO)
    text = read(tokenizer, options.steps * BATCH + HELD)
    print(text.describe(), flush=True)
    rows = []
    for seed in range(options.seeds):
        for size in options.sizes:
            tried = {}
            for rate in options.rates:
                out = options.out / f"{size[0]}x{size[1]}-seed{seed}-{rate:g}"
                tried[train(out, size, seed, rate, text, tokenizer)] = out
            rows.append(measure(tried[min(tried)], size, seed, options.rates, text))
            print(f"{rows[-1].checkpoint}: {rows[-1].detail['parameters']:,} parameters, "
                  f"nll {rows[-1].value:.4f} ± {rows[-1].stderr:.4f}", flush=True)  # fmt: skip
            lines = [json.dumps(row.model_dump()) + "\n" for row in rows]
            (options.out / "ladder.jsonl").write_text("".join(lines))


def _size(text: str) -> tuple[int, int]:
    width, _, blocks = text.partition("x")
    return int(width), int(blocks)


if __name__ == "__main__":
    main()
