"""A student of half the blocks, taught by the demo model or by the text alone.

    python -m eval.benchmarks.half_student runs/half --steps 200

Both start from every third block of the demo model (45% of its parameters) and read the same
windows in the same order; every second block is 59%, for the embeddings stay.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import recipe as recipes
from compress import run as runs
from compress.checkpoint import load, load_tokenizer
from eval.compare import paired
from eval.harness import evaluate
from eval.results import Result


def fewer_blocks(out: Path, every: int) -> Path:
    """The last of each ``every`` blocks of the demo model, as a model folder of their own."""
    model: Any = load("demo")
    kept = list(model.model.layers)[every - 1 :: every]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    model.to(torch.bfloat16).save_pretrained(out)
    load_tokenizer("demo").save_pretrained(out)  # type: ignore[union-attr]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=3, help="of so many blocks one is kept")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--windows", type=int, default=1024, help="of the evaluation text")
    parser.add_argument("--cached", action="store_true", help="a teacher kept on disk, too")
    options = parser.parse_args()
    half = options.out / "half"
    if not half.exists():
        fewer_blocks(half, options.every)
    ways: dict[str, dict[str, Any]] = {
        "text": {"kl_share": 0.0},
        "taught": {},
    }
    if options.cached:
        ways["taught-cached"] = {"cache": 64}
    folders = [str(half)]
    for name, way in ways.items():
        folder = options.out / name
        stage = {
            "use": "distill", "teacher": "demo", "steps": options.steps, "length": options.length,
            "learning_rate": options.learning_rate, **way,
        }  # fmt: skip
        recipe = recipes.load_one(
            {"model": str(half), "calibration": {"data": "demo"}, "stages": [stage]}
        )
        if not folder.exists():
            info = runs.apply(recipe, folder)
            told = info["stages"][0]
            print(name, told["steps"], "steps, held out:", told["held_out_loss"], flush=True)
        folders.append(str(folder))
    metrics, samples = ["nll", "size_bytes"], options.windows
    measured = evaluate(["demo", *folders], metrics, data="demo", samples=samples)
    rows = [row for row in measured if isinstance(row, Result)]
    found = {(Path(row.checkpoint).name, row.metric): row for row in rows}
    for name in ("demo", "half", *ways):
        nll, size = found[name, "nll"], found[name, "size_bytes"]
        print(f"{name:15} nll {nll.value:.4f} ± {nll.stderr:.4f}  {size.value:,.0f} bytes")
    pairs = [("taught", "text"), ("taught-cached", "taught")]
    for a, b in pairs[: len(ways) - 1]:
        gap = paired(found[a, "nll"], found[b, "nll"])
        print(
            f"{a} − {b}: {gap.mean:+.4f}, standard error {gap.stderr:.4f}, "
            f"95% [{gap.low:+.4f}, {gap.high:+.4f}] ({gap.words})"
        )


if __name__ == "__main__":
    main()
