"""The planner against its promises: bytes, predictions, the quality that is to be kept.

    python -m eval.benchmarks.planner bytes coverage keep
    python -m eval.benchmarks.planner shapes --families quantization,depth,width
    python -m eval.benchmarks.planner growth

Choices are made on calibration text; ``keep`` is measured on evaluation text, too. Plans beside
uniform recipes are in ``budgets.py``.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress import recipe as recipes
from compress import run as runs
from compress.events import outcome
from compress.planning.base import Planning
from compress.planning.cache import cache_folder
from compress.planning.goals import keep, planner_of
from compress.planning.menus import FAMILIES
from compress.planning.shaped import ShapedPlanner
from compress.recipe import Recipe
from compress.source import Source
from eval.benchmarks import random_llama
from eval.benchmarks.budget_rows import SIZES
from eval.harness import Notice, Progress, evaluate

WIDTHS = (64, 128, 256)  # of the random Llamas of six blocks whose frontiers are timed


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("parts", nargs="+", choices=(*PARTS, "growth"))
    arguments.add_argument("--model", default="demo")
    arguments.add_argument("--data", default="demo")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--families", default="quantization", help=", ".join(FAMILIES))
    asked = arguments.parse_args()
    if "growth" in asked.parts:
        grow()
        if asked.parts == ["growth"]:
            return
    recipe = recipes.load_one({
        "model": asked.model,
        "seed": asked.seed,
        "calibration": {"data": asked.data},
        "stages": [{"use": "gptq", "targets": ["all"]}],
    })  # fmt: skip
    families = asked.families.split(",")
    planner = planner_of(recipe, Source(recipe.model), recipe.stages[0], families, cache_folder())
    outcome(planner.work())
    for part in asked.parts:
        if part in PARTS:
            print(f"\n{part}, {asked.model}, seed {asked.seed}", flush=True)
            PARTS[part](planner)


def sizes(planner: Planning, count: int, least: int, most: float) -> list[int]:
    draw = random.Random(planner.recipe.seed)
    return [int(draw.uniform(least, most * planner.source.nbytes)) for _ in range(count)]


def count(planner: Planning) -> None:
    """Fifty sizes beside the files that are planned; five of them written."""
    plans = [planner.fit(size) for size in sizes(planner, 50, planner.least, 0.95)]
    gaps = [1 - plan.bytes / plan.budget for plan in plans]
    print(f"above {sum(g < 0 for g in gaps)}, median gap {statistics.median(gaps):.3%}, "
          f"largest {max(gaps):.2%}")  # fmt: skip
    for plan in plans[:5]:
        with tempfile.TemporaryDirectory() as folder:
            info = runs.apply(plan.recipe, Path(folder) / "out", verify=False)
        print(f"budget {plan.budget:,}  planned {plan.bytes:,}  on disk {info['bytes']['disk']:,}")


def cover(planner: Planning) -> None:
    """Twenty random sizes: whether the measured KL lies within the predicted interval."""
    inside = 0
    for size in sizes(planner, 20, planner.useful(), 0.5):
        plan = planner.measured(planner.fit(size))
        assert plan.predicted
        assert plan.measured
        kl, low, high = plan.predicted
        inside += low <= plan.measured[0] <= high
        share = plan.bytes / planner.source.nbytes
        print(f"{share:6.1%}  predicted {kl:.5f} ({low:.5f}–{high:.5f})"
              f"  measured {plan.measured[0]:.5f} ± {plan.measured[1]:.5f}")  # fmt: skip
    print(f"{inside} of 20 within")


def shapes(planner: ShapedPlanner) -> None:
    """For each size what every shape is expected to cost; the best two measured.

    Depth or width has to be among the families.
    """
    for one in planner.planners:
        name = " ".join(stage.compressor.summary() for stage in one.shape.stages)
        print(f"{name or 'as it is'}: KL {one.shape.kl:.4f}, least {one.least:,} bytes")
    for percent in (*SIZES, 8):
        size = percent * planner.source.nbytes // 100
        if size < planner.least:
            print(f"{percent}%: below the least plan")
            continue
        plans = sorted(planner.fits(size), key=lambda plan: plan.expected)
        for place, plan in enumerate(plans):
            said = f"{percent}%  {plan.shape or 'as it is'}  expected {plan.expected:.4f}"
            if place < 2 or not plan.shape:
                kl, error = planner.measured(plan).measured or (0.0, 0.0)
                said += f"  measured {kl:.4f} ± {error:.4f}"
            print(said, flush=True)


def grow() -> None:
    """A frontier of ten from nothing, for models of three sizes: seconds and peak memory."""
    print("parameters  seconds  of processor time  peak memory")
    for width in WIDTHS:
        with tempfile.TemporaryDirectory() as home:
            shape = {"num_key_value_heads": width // 64, "tie_word_embeddings": True}
            parameters = random_llama.save(Path(home, "model"), width, 6, head=32, **shape)
            start = time.perf_counter()
            command = ["plan", "--frontier", "10", "--model", f"{home}/model", "--data", "demo"]
            done = subprocess.Popen(
                [sys.executable, "-m", "compress.cli", *command, "--quiet", "--out", f"{home}/out"],
                env=os.environ | {"XDG_CACHE_HOME": home},
            )
            _, status, used = os.wait4(done.pid, 0)
            if status:
                sys.exit(f"compress {' '.join(command)} ended with {status}")
            print(f"{parameters:,}  {time.perf_counter() - start:.0f}  "
                  f"{used.ru_utime + used.ru_stime:.0f}  {used.ru_maxrss / 1e6:.2f} GB",
                  flush=True)  # fmt: skip


def keeps(planner: Planning) -> None:
    """99% kept: the plan and the one a step smaller, on evaluation text."""
    for plan in outcome(keep(planner, 0.99)):
        if plan and plan.measured:
            there = measured(plan.recipe)
            print(f"{plan.bytes:,} bytes: KL {plan.measured[0]:.5f} ± {plan.measured[1]:.5f} on "
                  f"calibration text kept apart, {there['kl']:.5f} on evaluation text "
                  f"(0.01005 allowed), nll {there['nll']:+.5f}")  # fmt: skip


def measured(recipe: Recipe) -> dict[str, Any]:
    """Bytes, nll − original and KL of what a recipe makes, on evaluation text."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        info = runs.apply(recipe, out, verify=False)
        rows = evaluate([recipe.model, str(out)], ["nll", "kl"])
        lines = [row.line() for row in rows if not isinstance(row, Notice | Progress)]
    nll = [line["value"] for line in lines if line["metric"] == "nll"]
    kl = [line["value"] for line in lines if line["metric"] == "kl"]
    return {"bytes": info["bytes"]["disk"], "nll": nll[-1] - nll[0], "kl": kl[-1]}


PARTS: dict[str, Callable[[Any], None]] = {
    "bytes": count, "coverage": cover, "keep": keeps, "shapes": shapes,
}  # fmt: skip

if __name__ == "__main__":
    main()
