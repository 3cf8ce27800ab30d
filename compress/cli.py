"""The command line: every command a few lines around the library, and the progress bars.

Exit codes: 0 done; 1 a defect of this program; 2 recipe or arguments; 3 model; 4 data; 5 output or
failed check; 6 plug-in; 130 interrupted. With ``--json`` results are the only thing on standard
output, one JSON object a line; progress and errors go to standard error.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if "OMP_WAIT_POLICY" not in os.environ:  # spinning threads make busy machines tens of times slower
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # but to wake takes long (GNU OpenMP)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.markup import escape

from compress.arguments import (
    PLANNED,
    Columns,
    Data,
    Dataset,
    Folders,
    Json,
    Length,
    Limit,
    Memory,
    Model,
    Overwrite,
    Quiet,
    Recipes,
    Samples,
    Seed,
    Sets,
    Size,
    Tasks,
    Verify,
    names,
    overrides,
    pairs,
)
from compress.display import (
    dry_run_table,
    explanation,
    follow,
    listing,
    measuring,
    screen,
    summary,
)
from compress.errors import CompressError, RecipeError, did_you_mean
from compress.export_command import export
from compress.generate_command import generate
from compress.hub import push
from compress.plan_command import plan
from compress.serve_command import serve
from eval.scaling.cli import fit

if TYPE_CHECKING:
    from compress.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Compress Hugging Face models from a recipe, check the result, chart quality against size."
    "\n\nBegin with:  [bold]compress run recipes/quickstart.yaml[/]",
)


@app.command()
def run(
    recipes: Recipes = None,
    out: Annotated[Path | None, typer.Option(help="Default: runs/RECIPE")] = None,
    size: Size = None,
    model: Model = None,
    data: Data = None,
    seed: Seed = None,
    sets: Sets = None,
    memory: Memory = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Do it all: compress every variant of the recipes, evaluate them, and write report.html.

    What is done already is kept, so a run that was interrupted goes on where it stopped.

    [bold]compress run recipes/quickstart.yaml[/]
    """
    from compress import recipe as recipe_files

    changes = overrides(model, data, seed, sets, size)
    variants: dict[str, Recipe] = {}
    if not recipes and not size:
        raise RecipeError("RECIPE is missing; or give --size, e.g. 30%: compress run --help")
    for path in recipes or [PLANNED]:  # type: ignore[list-item]
        for name, recipe in recipe_files.load(path, changes).items():
            if name in variants:
                raise RecipeError(f"two variants are called '{name}'; rename one")
            variants[name] = recipe
    out = out or Path("runs") / (recipes[0].stem if recipes else "planned")
    folders = _compress_all(variants, out, quiet)
    evaluation = next(iter(variants.values())).evaluate
    rows = _evaluate(
        folders,
        evaluation.metrics or None,
        quiet,
        tasks=evaluation.tasks,
        dataset=evaluation.dataset or None,
        columns=evaluation.columns,
        limit=evaluation.limit,
        data=evaluation.data or None,
        samples=evaluation.samples,
        length=evaluation.length,
    )
    if as_json:
        for row in rows:
            print(json.dumps(row.line()))
    from eval.report import write_report

    written = write_report([Path(f) for f in folders], out / "report.html")
    if not quiet and not as_json:
        summary(folders, rows)
        screen.print(f"\nReport: [bold]{written[0]}[/]")


@app.command()
def apply(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="A YAML recipe file.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The checkpoint folder to write.")] = None,
    model: Model = None,
    data: Data = None,
    seed: Seed = None,
    sets: Sets = None,
    size: Size = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and count; write nothing.")
    ] = False,
    memory: Memory = None,
    overwrite: Overwrite = False,
    verify: Verify = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Apply one recipe to a model and write a checkpoint folder, checked by plain transformers.

    [bold]compress apply recipes/int4.yaml --model ./my-model --out ./my-model-int4[/]
    """
    from compress import recipe as recipe_files

    if recipe is None and not size:
        raise RecipeError("RECIPE is missing; or give --size, e.g. 30%: compress apply --help")
    loaded = recipe_files.load_one(recipe or PLANNED, overrides(model, data, seed, sets, size))
    if dry_run:
        dry_run_table(loaded, as_json)
        return
    if out is None:
        raise RecipeError("--out DIR is missing: where should the checkpoint go?")
    from compress import run as runs

    events = runs.run(loaded, out, overwrite=overwrite, verify=verify)
    info = follow(events, out.name, quiet or as_json)
    if as_json:
        told = {key: info[key] for key in ("bytes", "storage", "loads_with")}
        print(json.dumps({"out": str(out)} | told))
    elif not quiet:
        taken = info["bytes"]
        screen.print(
            f"{out}: {taken['disk']:,} bytes, {taken['disk'] / taken['original']:.1%} of the "
            f"original; loads with {info['loads_with']}",
            highlight=False,
        )


@app.command("eval")
def evaluate(
    folders: Folders,
    metrics: Annotated[
        str | None, typer.Option(help="Comma-separated; see `compress list`.")
    ] = None,
    tasks: Tasks = None,
    data: Data = None,
    dataset: Dataset = None,
    columns: Columns = None,
    samples: Samples = 128,
    limit: Limit = None,
    length: Length = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Sliding windows, this far apart.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which text comes first.")] = 0,
    baseline: Annotated[str | None, typer.Option(help="Compare with this model.")] = None,
    force: Annotated[bool, typer.Option(help="Measure again what is known already.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure checkpoints, ours or any Hugging Face folder; rows are kept in results.jsonl.

    [bold]compress eval runs/quickstart/* --metrics nll,size_bytes --json[/]
    """
    asked = names(tasks)
    chosen = names(metrics) if metrics or asked else None
    rows = _evaluate(
        folders,
        chosen,
        quiet or as_json,
        tasks=asked,
        dataset=dataset,
        columns=pairs(columns, "--columns"),
        limit=limit,
        data=data,
        samples=samples,
        length=length,
        stride=stride,
        seed=seed,
        baseline=baseline,
        force=force,
    )
    if as_json:
        for row in rows:
            print(json.dumps(row.line()))
    elif not quiet:
        summary(folders, rows)


@app.command()
def report(
    folders: Folders,
    out: Annotated[Path, typer.Option(help="An .html file.")] = Path("report.html"),
    baseline: Annotated[Path | None, typer.Option(help="The folder to compare with.")] = None,
    metric: Annotated[str | None, typer.Option(help="What the chart shows; nll if known.")] = None,
    quiet: Quiet = False,
) -> None:
    """Draw evaluated checkpoints: an HTML page, the same as Markdown and CSV, the chart as PNG.

    [bold]compress report runs/quickstart/*/ --out report.html[/]
    """
    from eval.report import write_report

    written = write_report([Path(f) for f in folders], out, baseline=baseline, metric=metric)
    if not quiet:
        for path in written:
            screen.print(path)


@app.command()
def verify(folders: Folders, as_json: Json = False, quiet: Quiet = False) -> None:
    """Prove that folders hold what was made: files whole, plain transformers loads them the same.

    [bold]compress verify ./my-model-int4[/]
    """
    from compress.export import vllm
    from compress.stored import Stored
    from compress.verify import verify as check

    for folder in folders:
        found = check(folder) | {"vllm": vllm.said(Stored(folder))}
        if as_json:
            print(json.dumps(found))
        elif not quiet:
            screen.print(
                f"[green]ok[/] {folder}: loads with {found['loads_with']}, logits within "
                f"{found['difference']:.1e}; vLLM {vllm.VERSION} {found['vllm']}",
                highlight=False,
            )


@app.command("list")
def list_all(as_json: Json = False) -> None:
    """List the compressors, exporters and metrics that are installed, plug-ins included."""
    from compress import registry
    from eval import metrics

    rows = [("compressor", n, p) for n, p in registry.available().items()]
    rows += [("exporter", n, p) for n, p in registry.available(registry.EXPORTERS).items()]
    rows += [("metric", n, p) for n, p in metrics.available().items()]
    if as_json:
        for kind, name, point in rows:
            package = point.dist.name if point.dist else ""
            print(json.dumps({"kind": kind, "name": name, "package": package}))
        return
    listing(rows)


@app.command()
def explain(
    name: Annotated[str, typer.Argument(help="A compressor; see `compress list`.")],
    as_json: Json = False,
) -> None:
    """Say what a compressor does: formula, source, parameters with bounds, and an example."""
    from compress import registry

    cls = registry.get(name)
    schema = cls.model_json_schema()["properties"]
    if as_json:
        print(json.dumps({"name": name, "doc": cls.__doc__, "parameters": schema}))
        return
    explanation(cls, name)


def _compress_all(variants: dict[str, Recipe], out: Path, quiet: bool) -> list[str]:
    """One checkpoint folder a variant; those that are there already are kept."""
    from compress import run as runs
    from compress.planning.goals import resolved
    from compress.preflight import check_variants
    from compress.verify import Verifier

    sources = check_variants(variants)
    folders = []
    with Verifier() as verifier:
        for name, recipe in variants.items():
            source, folder = sources[name], out / name
            recipe = follow(resolved(recipe, source), name, quiet)
            folders.append(str(folder))
            if runs.is_done(recipe, source, folder):
                if not quiet:
                    screen.print(f"{name:<18} done already")
                continue
            events = runs.run(
                recipe, folder, overwrite=folder.exists(), verifier=verifier, source=source
            )
            info = follow(events, name, quiet)
            if not quiet:
                taken = info["bytes"]
                share = f"{taken['disk'] / taken['original']:>6.1%}"
                screen.print(f"{name:<18} {taken['disk']:>12,} bytes  {share}")
    return folders


def _evaluate(
    folders: list[str], metrics: list[str] | None, quiet: bool, **options: Any
) -> list[Any]:
    from eval.harness import Notice, evaluate
    from eval.harness import Progress as Step

    rows = []
    notices = []
    with measuring(quiet) as (begin, watch):
        for event in evaluate(folders, metrics, watch=watch, **options):
            if isinstance(event, Step):
                begin(event.label.rpartition("/")[2], event.done, event.total)
            elif isinstance(event, Notice):
                notices.append(event.text)
            else:
                rows.append(event)
    if not quiet:
        for text in dict.fromkeys(notices):
            screen.print(f"[yellow]note[/] {text}")
    return rows


def main() -> None:
    """Entry point: CompressError becomes one line and its exit code."""
    gc.set_threshold(20_000)  # imports make much that stays; looking for garbage in it takes long
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app(standalone_mode=False)
    except CompressError as error:
        screen.print(f"[red]error[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        screen.print("interrupted; finished blocks are kept, run the same command to go on")
        sys.exit(130)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:  # click's usage errors carry their own text and exit code
        if hasattr(error, "format_message"):
            text = error.format_message()
            command = getattr(getattr(error, "ctx", None), "command", None)
            if text.startswith("No such command"):
                text = text.rstrip(".") + did_you_mean(text.split("'")[1], COMMANDS)
            name = f"{command.name} --help" if command and command.name else "--help"
            screen.print(f"[red]error[/] {escape(text)} (see compress {name})", soft_wrap=True)
            sys.exit(2)
        raise


COMMANDS = (
    "run", "apply", "plan", "eval", "report", "fit", "verify", "export", "generate", "serve",
    "push", "list", "explain",
)  # fmt: skip
for command in (plan, fit, export, generate, serve, push):
    app.command()(command)

if __name__ == "__main__":
    main()
