"""What each part of calibrated rounding buys, added one after another, at the same bytes.

    python -m eval.benchmarks.ablation runs/ablation

Blocks only. A grid that just spans its group's range stands for one that is not searched. Rows are
kept in ``rows.jsonl`` and not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from compress import recipe as recipes
from compress import run as runs
from compress.compressors.quantization import packed
from compress.compressors.quantization.grid import Grid
from eval.benchmarks.budget_rows import loss, over_seeds
from eval.harness import evaluate
from eval.results import Result

PUBLISHED = {"use": "gptq", "propagate": 0, "polish": 0}  # arXiv 2210.17323, by descending H_jj
GPTQ = {"use": "gptq"}
STEPS: dict[str, tuple[bool, list[dict[str, Any]]]] = {  # whether the grid is searched, stages
    "nearest, grid over the range": (False, [{"use": "rtn"}]),
    "nearest, grid searched": (True, [{"use": "rtn"}]),
    "feedback, grid over the range": (False, [PUBLISHED]),
    "feedback, grid searched": (True, [PUBLISHED]),
    "+ error of earlier layers": (True, [GPTQ | {"polish": 0}]),
    "+ polish": (True, [GPTQ]),
    "+ loss-weighted tokens": (True, [GPTQ | {"loss_weighted": True}]),
    "+ learned rounding": (True, [GPTQ, {"use": "autoround"}]),
}  # the last two each from "+ polish" on


def range_grid(
    W: Tensor, h: Tensor, *, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> Grid:
    """The symmetric grid whose ends are the largest weight of a group, whatever reads it."""
    reach = torch.stack([part.abs().amax(1) for part in W.float().split(group, 1)], 1)
    middle = torch.full_like(reach, 2.0 ** (bits - 1))
    grid = Grid(torch.ones_like(reach, dtype=dtype), middle, bits, group, symmetric)
    return replace(grid, scale=grid.storable(reach * 2 / grid.top))


def nll(folder: str, data: str) -> Result:
    found = evaluate([folder], ["nll"], data=data)
    return next(row for row in found if isinstance(row, Result))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="demo", help="demo, or a folder")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group", default=64, type=lambda g: g if g == "channel" else int(g))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "rows.jsonl"
    lines = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []
    rows = {tuple(key): samples for key, samples in lines}
    original = nll(options.model, options.data)
    print("| | " + " | ".join(f"{bits} bits" for bits in options.bits) + " |")
    print("|---|" + "---:|" * len(options.bits), flush=True)
    for name, (searched, stages) in STEPS.items():
        cells = []
        for bits in options.bits:
            for seed in options.seeds:
                key = (options.model, options.group, name, bits, seed)
                if key in rows:
                    continue
                setting = {"bits": bits, "group": options.group}
                told = [s | (setting if s["use"] != "autoround" else {}) for s in stages]
                recipe = recipes.load_one(
                    {"model": options.model, "seed": seed, "stages": told,
                     "calibration": {"data": options.data, "samples": 128, "length": 256}}
                )  # fmt: skip
                grid: AbstractContextManager[Any] = nullcontext()
                if not searched:
                    grid = patch.object(packed, "search_grid", range_grid)
                with grid, tempfile.TemporaryDirectory() as folder:
                    runs.apply(recipe, Path(folder) / "out", verify=False)
                    rows[key] = nll(f"{folder}/out", options.data).samples
                with file.open("a") as stream:
                    stream.write(json.dumps([key, rows[key]]) + "\n")
            keys = [(options.model, options.group, name, bits, seed) for seed in options.seeds]
            found = [original.model_copy(update={"samples": rows[key]}) for key in keys]
            cells.append(loss(over_seeds(found), original))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
