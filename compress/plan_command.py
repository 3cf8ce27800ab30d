"""``compress plan``: a size in, a recipe out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.arguments import Data, Json, Memory, Model, Quiet, Seed, Sets, names, overrides
from compress.display import follow, frontier_table, plan_table, screen
from compress.errors import RecipeError
from compress.sizes import parse_effort, parse_share

if TYPE_CHECKING:
    from compress.planning.plan import Plan

FORMATS = ("any", "compressed-tensors")
SIZE = "30% of the model's bytes, 300MB, 1.5GB, or bytes."


def plan(
    size: Annotated[str | None, typer.Option(help=SIZE)] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="The least size that surely keeps e.g. 99% of the quality, exp(-KL)."),
    ] = None,
    frontier: Annotated[
        int | None,
        typer.Option(min=2, help="So many sizes, a recipe for each, in the folder --out."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("plan.yaml"),
    model: Model = "demo",
    data: Data = None,
    families: Annotated[
        str,
        typer.Option(
            help="What to choose from: quantization, low-rank, pruning, residual, depth, width."
        ),
    ] = "quantization",
    targets: Annotated[str, typer.Option(help="Which weights, as in a recipe.")] = "all",
    format: Annotated[
        str, typer.Option(help="any, or compressed-tensors: only what that holds.")
    ] = "any",
    speed: Annotated[
        bool, typer.Option("--speed", help="Only what the packed runtime computes faster.")
    ] = False,
    effort: Annotated[
        str,
        typer.Option(
            help="Other plans to measure, e.g. 6, or for how long, 10min; the best is kept."
        ),
    ] = "0",
    seed: Seed = None,
    sets: Sets = None,
    memory: Memory = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose a method and its settings for every matrix so that the file is just within a size.

    [bold]compress plan --size 25% --out small.yaml && compress apply small.yaml --out small[/]
    """
    from compress import recipe as recipe_files
    from compress.planning import goals
    from compress.planning.cache import cache_folder
    from compress.source import Source

    if sum(given is not None for given in (size, keep, frontier)) != 1:
        raise RecipeError("give one of --size, --keep and --frontier")
    tries, seconds = parse_effort(effort)
    if tries and not size:
        raise RecipeError("--effort betters the plan of one size: give --size")
    if format not in FORMATS:
        raise RecipeError(f"--format {format}: choose one of {', '.join(FORMATS)}")
    asked = {"stages": [{"use": "gptq", "targets": names(targets)}]}
    recipe = recipe_files.load_one(asked, overrides(model, data, seed, sets))
    source = Source(recipe.model, untie=recipe.untie)
    budget = goals.bytes_of(size, source) if size else None
    share = parse_share(keep) if keep else 0.0
    planner = goals.planner_of(
        recipe, source, recipe.stages[0], names(families), cache_folder(),
        plain=format != "any", speed=speed,
    )  # fmt: skip
    silent = quiet or as_json
    follow(planner.work(budget), "plan", silent)
    below: Plan | None = None
    if budget:
        plans = [follow(planner.refine(planner.fit(budget), tries, seconds), "plan", silent)]
    elif frontier:
        plans = follow(planner.frontier(frontier), "plan", silent)
    else:
        made, below = follow(goals.keep(planner, share), "plan", silent)
        plans = [made]
    for one in plans:
        path = out.with_suffix("") / f"{one.bytes}.yaml" if frontier else out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(one.to_yaml(source.nbytes))
        if as_json:
            typer.echo(json.dumps({"recipe": str(path)} | one.numbers()))
    if silent:
        return
    if frontier:
        frontier_table(plans, source)
        screen.print(f"\n{out.with_suffix('')}/: a recipe for each")
        return
    plan_table(plans[0], source)
    if keep:
        smaller = "nothing smaller can be planned"
        if below and below.measured:
            kl, error = below.measured
            smaller = f"one step smaller, {below.bytes:,} bytes: KL {kl:.4f} ± {error:.4f}"
        screen.print(smaller)
    screen.print(f"\n{out}: apply it with [bold]compress apply {out} --out DIR[/]")
