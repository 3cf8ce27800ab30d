"""A plan beside the best recipe that treats all matrices alike, at five sizes, for several seeds.

    python -m eval.benchmarks.budgets runs/budgets --seeds 0 1 2 --peers
    python -m eval.benchmarks.budgets runs/budgets-opt --model runs/opt-code --seeds 0 1 2
    python -m eval.benchmarks.budgets runs/budgets --families quantization,width --effort 6

Of every family's settings whose whole file fits a size, the one of least KL on calibration text
that recipes do not read is taken, so that only what is chosen meets the evaluation text. The
family that is the best there is made for every seed, the others for the first; one that loses more
at a larger size than another at this one is left out. Rows are kept in ``rows.jsonl`` and not made
again.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import CompressError, RecipeError
from compress.events import outcome
from compress.planning.cache import cache_folder
from compress.planning.files import Files
from compress.planning.goals import planner_of
from compress.planning.measure import measure
from compress.planning.menus import GROUPS, menus_of
from compress.planning.options import Option
from compress.planning.shapes import SHAPES, Shape
from compress.shape import predicted
from eval.benchmarks.budget_peers import PEERS
from eval.benchmarks.budget_rows import SIZES, STORAGE, Bench, Row, table

# Settings by family, in lines along which files shrink: of each line the first that fits counts.
LINES: dict[str, list[list[dict[str, Any]]]] = {
    "gptq": [[{"bits": b, "group": g} for g in GROUPS] for b in (2, 3, 4, 5, 6)],
    "ecgptq": [[{"bits": n / 50} for n in range(300, 54, -1)]],
    "gptq_residual": [[{"bits": b, "ratio": n / 128} for n in range(32, 0, -1)] for b in (2, 3, 4)],
    "gptq_sparse": [[{"bits": b, "sparsity": n / 50} for n in range(5, 48)] for b in (2, 3, 4)],
    "svd": [[{"ratio": n / 100} for n in range(99, 1, -1)]],
    "admm": [[{"sparsity": n / 100} for n in range(5, 99)]],
    "width": [[{"amount": n / 32} for n in range(1, 31)]],
    "depth": [[{"amount": n / 32} for n in range(1, 31)]],
}
ALIKE = {"svd": {"ranks": "uniform"}, "admm": {"allocation": "uniform"}}
ITSELF = "ecgptq, shared"  # bits that it shares out by itself


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--model", default="demo")
    arguments.add_argument("--data", default="demo")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="percent")
    arguments.add_argument("--families", default="quantization", help="of the plan")
    arguments.add_argument("--effort", type=int, default=0, help="plans measured for each of ours")
    arguments.add_argument("--peers", action="store_true", help="llama.cpp and auto-round, too")
    asked = arguments.parse_args()
    bench = Bench(asked.out, asked.model, asked.data, asked.seeds)
    for seed in bench.seeds:
        plans(bench, asked.sizes, seed, asked.families, asked.effort)
        for percent in asked.sizes:
            uniform(bench, percent, seed)
    for seed, percent in itertools.product(bench.seeds, asked.sizes):
        shared(bench, percent, seed)
    if asked.peers:
        peers(bench, asked.sizes)
    print(table(bench, list(LINES)))


def plans(bench: Bench, sizes: Sequence[int], seed: int, families: str, effort: int) -> None:
    """A plan for every size; of several that of least KL on calibration text."""
    name = f"plan, {families}" + (f", effort {effort}" if effort else "")
    missing = [percent for percent in sizes if (percent, seed, name) not in bench.rows]
    if not missing:
        return
    recipe = bench.recipe(seed, {"use": "gptq", "targets": ["all"]})
    wanted = families.split(",")
    planner = planner_of(recipe, bench.source, recipe.stages[0], wanted, cache_folder())
    outcome(planner.work())
    for percent in missing:
        if bench.size(percent) < planner.least:
            print(f"{percent}%: the least plan has {planner.least:,} bytes", flush=True)
            continue
        made = outcome(planner.refine(planner.fit(bench.size(percent)), effort))
        bench.add(percent, seed, name, made.shape, made.recipe)


def uniform(bench: Bench, percent: int, seed: int) -> None:
    """Every family for the first seed, the best of them for the others."""
    first = bench.seeds[0]
    if seed != first:
        there = [bench.rows[key] for use in LINES if (key := (percent, first, use)) in bench.rows]
        for row in sorted(there, key=lambda row: row.kl)[:1]:
            if (percent, seed, row.name) not in bench.rows:
                recipe = bench.recipe(seed, json.loads(row.setting))
                bench.add(percent, seed, row.name, row.setting, recipe)
        return
    for use in LINES:
        if (percent, seed, use) in bench.rows:
            continue
        if hopeless(bench, percent, use):
            print(f"{percent}% {use}: loses more at a larger size than others here", flush=True)
            continue
        try:
            stage = chosen(bench, percent, use)
            if stage:
                bench.add(percent, seed, use, json.dumps(stage), bench.recipe(seed, stage))
            else:
                print(f"{percent}% {use}: nothing is so small", flush=True)
        except CompressError as error:
            print(f"{percent}% {use}: {error}", flush=True)


def shared(bench: Bench, percent: int, seed: int) -> None:
    """What shares out its own bits, from as many as fit if all matrices have them."""
    if not (uniform := bench.rows.get((percent, bench.seeds[0], "ecgptq"))):
        return
    rate = json.loads(uniform.setting)["overrides"]["all"]["bits"]
    while (percent, seed, ITSELF) not in bench.rows:
        recipe = bench.recipe(seed, {"use": "ecgptq", "bits": rate, "targets": ["all"]})
        row = bench.add(percent, seed, ITSELF, f"{rate:.3f}", recipe)
        rate *= 0.999 * bench.size(percent) / row.bytes  # until it fits


def hopeless(bench: Bench, percent: int, use: str) -> bool:
    """Whether a family's KL at a larger size is above another's at this one."""
    seen = [row for row in bench.rows.values() if row.seed == bench.seeds[0]]
    here = [row.kl for row in seen if row.percent == percent and row.name in LINES]
    larger = [row.kl for row in seen if row.percent > percent and row.name == use]
    return bool(here and larger) and max(larger) > min(here)


def chosen(bench: Bench, percent: int, use: str) -> dict[str, Any] | None:
    """The stage that is made: of those of most bits that fit, the one of less KL."""
    fits: list[dict[str, Any] | None] = [None, None]
    for line in LINES[use]:
        place = bisect.bisect_left(
            line, True, key=lambda setting: stage(bench, use, setting)[1] <= bench.size(percent)
        )
        fits += [stage(bench, use, line[place])[0]] if place < len(line) else []
    low, high = fits[-2:]
    if not low or not high:
        return high
    whole = Shape.whole(bench.source)

    def kl(made: dict[str, Any]) -> float:
        return measure(bench.recipe(bench.seeds[0], made), whole, bench.held)[0]

    return min((high, low), key=kl)


def stage(bench: Bench, use: str, setting: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """A stage that gives all matrices this setting, and the bytes of its file."""
    if use in SHAPES:
        made = {"use": use} | setting
        try:
            after = predicted(bench.recipe(0, made).stages[0], bench.source)
        except RecipeError:  # so small a share that nothing goes
            return made, float("inf")
        return made, Files(after, {}, STORAGE).size({})
    menus = menus_of([use])
    sites = bench.source.anatomy.sites
    taken = [site.name for site in sites if menus[use].knots(site)]
    alike = dict.fromkeys(taken, Option.of(use, **setting))
    size = Files(bench.source, menus, STORAGE).size(alike)
    said = {"overrides": {"all": setting}} if use == "ecgptq" else setting  # else it shares them
    targets = ["all"] if len(taken) == len(sites) else ["blocks"]
    return {"use": use, "targets": targets} | said | ALIKE.get(use, {}), size


def peers(bench: Bench, sizes: Sequence[int]) -> None:
    """What other toolkits' automatic schemes come to, where they reach a size."""
    for percent in sizes:
        for name, made in PEERS.items():
            if (percent, bench.seeds[0], name) in bench.rows:
                continue
            try:
                with tempfile.TemporaryDirectory() as folder:
                    found = made(bench.model, bench.data, bench.size(percent), Path(folder))
            except CompressError as error:
                print(f"{percent}% {name}: {error}", flush=True)
                continue
            nll = bench.original.model_copy(update={"samples": found.nll})
            bench.keep(
                Row(percent, bench.seeds[0], name, found.setting, found.bytes, nll, float("nan"))
            )


if __name__ == "__main__":
    main()
