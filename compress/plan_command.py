"""``compress plan``: a size in, a recipe out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.arguments import Data, Json, Model, Quiet, Seed, Sets, names, overrides, parse_size
from compress.display import follow, plan_table, screen


def plan(
    size: Annotated[str, typer.Option(help="30% of the model's bytes, 300MB, 1.5GB, or bytes.")],
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("plan.yaml"),
    model: Model = "demo",
    data: Data = None,
    targets: Annotated[str, typer.Option(help="Which weights, as in a recipe.")] = "all",
    seed: Seed = None,
    sets: Sets = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose bits for every matrix so that the file is just within a size; writes a recipe.

    [bold]compress plan --size 25% --out small.yaml && compress apply small.yaml --out small[/]
    """
    from compress import recipe as recipe_files
    from compress.plan import plan as planned
    from compress.source import Source

    asked = {"stages": [{"use": "gptq", "targets": names(targets)}]}
    recipe = recipe_files.load_one(asked, overrides(model, data, seed, sets))
    source = Source(recipe.model, untie=recipe.untie)
    budget = parse_size(size, source.nbytes)
    made = follow(planned(recipe, source, recipe.stages[0], budget), "plan", quiet or as_json)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(made.recipe.to_yaml())
    if as_json:
        numbers = {"bytes": made.bytes, "budget": budget, "cost": made.cost, "bits": made.bits}
        typer.echo(json.dumps({"recipe": str(out)} | numbers))
    elif not quiet:
        plan_table(made, source)
        screen.print(f"\n{out}: apply it with [bold]compress apply {out} --out DIR[/]")
