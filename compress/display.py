"""What the terminal shows: progress bars from events, and tables."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from compress.compressors.base import Compressor
    from compress.export.base import Exporter
    from compress.planning.plan import Plan
    from compress.preflight import Preflight
    from compress.recipe import Recipe
    from compress.source import Source

Result = TypeVar("Result")
screen = Console(stderr=True, highlight=False)
SHOWN = ("size_bytes", "nll", "kl", "top1_agreement", "decode_tokens_per_s")


def follow(events: Generator[Any, None, Result], name: str, quiet: bool) -> Result:
    """Draw events as a bar for each of their labels; returns what the generator does."""
    with progress(quiet) as bars:
        tasks: dict[str, Any] = {}
        while True:
            try:
                event = next(events)
            except StopIteration as stop:
                return stop.value
            numbers = event.numbers
            note = _note(numbers)
            if event.label not in tasks:
                tasks[event.label] = bars.add_task(
                    f"{name}: {event.label}", total=event.total, note=""
                )
            bars.update(tasks[event.label], completed=event.done, total=event.total, note=note)


def _note(numbers: dict[str, float]) -> str:
    """``loss 0.123, 4,567 tokens/s``: how a training stands."""
    said = [f"loss {numbers['loss']:.3f}"] if "loss" in numbers else []
    if "tokens_per_s" in numbers:
        said.append(f"{numbers['tokens_per_s']:,.0f} tokens/s")
    return ", ".join(said)


@contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """Progress bars, on a terminal; in a log they would be noise."""
    hidden = quiet or not screen.is_terminal
    console = Console(file=sys.stderr)  # as it is now: what is measured may be redirected meanwhile
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=hidden) as bars:
        yield bars


@contextmanager
def measuring(
    quiet: bool,
) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[int, int], None]]]:
    """Two bars: call the first with what begins, how many are done and of how many, and the second
    with how much of it is done."""
    with progress(quiet) as bars:
        task = bars.add_task("evaluate", total=None, note="")
        inside = bars.add_task("", visible=False, note="")

        def begin(label: str, done: int, total: int) -> None:
            bars.update(task, completed=done, total=total, description=label)
            bars.reset(inside, visible=False)

        def watch(done: int, total: int) -> None:
            bars.update(inside, completed=done, total=total, visible=done < total)

        yield begin, watch


def summary(folders: list[str], rows: list[Any]) -> None:
    """A checkpoint a row, the metrics most people ask for first."""
    by = {(row.checkpoint, row.metric): row for row in rows}
    measured = list(dict.fromkeys(row.metric for row in rows))
    scored = [m for m in measured if m == "accuracy" or m.startswith(("task:", "evaluate:"))]
    shown = [*(m for m in SHOWN if m in measured), *scored] or measured
    table = Table(
        "checkpoint",
        *(m.removeprefix("task:").replace("_", " ") for m in shown),
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for folder in folders:
        cells = [_cell(by.get((folder, metric))) for metric in shown]
        table.add_row(Path(folder).name, *cells)
    Console().print(table)


def _cell(row: Any) -> str:
    if row is None or row.value is None:
        return "–"
    if row.unit == "bytes":
        return f"{row.value:,.0f}"
    value = f"{row.value:,.0f}" if abs(row.value) >= 1000 else f"{row.value:.4g}"
    return value if row.stderr is None else f"{row.value:.4f}±{row.stderr:.2g}"


def listing(rows: list[tuple[str, str, EntryPoint]]) -> None:
    """Kind, name and entry point of every compressor, exporter and metric, a line each."""
    table = Table("name", "what it does", "from", box=None, header_style="bold", pad_edge=False)
    for kind, name, point in rows:
        line = (point.load().__doc__ or "").strip().splitlines()[0]
        table.add_row(name, line, f"{kind}, {point.dist.name if point.dist else '?'}")
    Console().print(table)


def exports_table(exporters: list[type[Exporter]], as_json: bool) -> None:
    """Which kinds of weight each format holds, and how; on standard output."""
    from compress.export import vllm
    from compress.export.export import KINDS, how

    if as_json:
        for cls in exporters:
            inputs = {"rounds_inputs": cls.rounds_inputs}
            print(json.dumps({"name": cls.name, "needs": cls.needs, "holds": cls.holds} | inputs))
        return
    names = [cls.name for cls in exporters]
    plain: dict[str, Any] = {"box": None, "header_style": "bold", "pad_edge": False}
    table = Table("weights", **plain, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, width=max(len(name), len("expanded")))
    for kind in KINDS:
        table.add_row(kind, *(how(cls, kind) or "—" for cls in exporters))
    # of w8a8 and fp8: whether what a matrix reads is rounded to 8 bits there, too
    table.add_row("8-bit inputs", *("kept" if c.rounds_inputs else "left away" for c in exporters))
    needs = Table("format", "needs", **plain)
    for cls in exporters:
        needs.add_row(cls.name, cls.needs)
    server = Table("weights", f"in vLLM {vllm.VERSION}", **plain)
    for kind, how_held in vllm.HOLDS.items():
        server.add_row(kind, how_held)
    console = Console()
    for each in (table, needs, server):
        console.print(each)
        console.print()


def bounds(field: dict[str, Any]) -> str:
    options = field.get("anyOf", [field])
    said = []
    for option in options:
        if "enum" in option or "const" in option:
            said += [str(v) for v in option.get("enum", [option.get("const")])]
        elif option.get("type") in ("integer", "number"):
            low = option.get("minimum", option.get("exclusiveMinimum"))
            high = option.get("maximum", option.get("exclusiveMaximum"))
            left = "" if low is None else f"{low} {'≤' if 'minimum' in option else '<'} "
            right = "" if high is None else f" {'≤' if 'maximum' in option else '<'} {high}"
            said.append(f"{left}{option['type']}{right}")
        elif option.get("type") == "string":
            said.append(option.get("pattern", "text"))
        elif option.get("type") != "null":
            said.append(str(option.get("type", "")))
    return " or ".join(said)


def explanation(cls: type[Compressor], name: str) -> None:
    """A compressor's docstring, parameters and an example, on standard output."""
    console = Console(highlight=False)
    doc = escape(inspect.cleandoc(cls.__doc__ or ""))  # [out, in] is a shape, not a style
    console.print(f"[bold]{name}[/]\n\n{doc}\n")
    table = Table(
        "parameter", "default", "may be", "meaning", box=None, header_style="bold", pad_edge=False
    )
    for key, field in cls.model_json_schema()["properties"].items():
        meaning = escape(field.get("description", ""))
        table.add_row(key, str(field.get("default")), bounds(field), meaning)
    console.print(table)
    console.print(
        "\n[bold]targets[/] roles (q_proj, down_proj, embed, head…), blocks, attention, "
        "mlp, all, or name patterns;\nby default "
        f"{', '.join(cls.default_targets)}. [bold]skip[/] the same; [bold]blocks[/] layer "
        "numbers."
    )
    takes = ", ".join(sorted(cls.accepts))
    console.print(f"Takes weights that are {takes}; leaves them {cls.makes}.")
    console.print(f"\nmodel: demo\nstages:\n  - use: {name}", markup=False)


def size(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def preflight_table(plan: Preflight) -> None:
    """What `compress apply --dry-run` found, on standard output."""
    table = Table(
        "stage",
        "weights",
        "bytes before",
        "bytes after",
        box=None,
        header_style="bold",
        pad_edge=False,
    )
    for stage in plan.stages:
        before, after = f"{stage.bytes_before:,}", f"{stage.bytes_after:,}"
        table.add_row(stage.use, str(stage.sites), before, after)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"\nmodel  {plan.model_before:,} → {plan.model_after:,} bytes "
        f"({plan.model_after / plan.model_before:.1%}), stored as compactly as it can be\n"
        f"needs  about {size(plan.memory)} of memory beyond the program's own, and "
        f"{size(plan.disk)} of disk while it works"
    )


def plan_table(plan: Plan, source: Source) -> None:
    """What each matrix becomes, by layer and role, a row a layer, on standard output."""
    sites = [site for site in source.anatomy.sites if site.name in plan.settings]
    roles = list(dict.fromkeys(site.role for site in sites if site.block is not None))
    table = Table("", *roles, box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    found = {(site.block, site.role): plan.settings[site.name].label for site in sites}
    for layer in sorted({site.block for site in sites if site.block is not None}):
        table.add_row(f"layer {layer}", *(found.get((layer, role), "") for role in roles))
    console = Console(highlight=False)
    console.print(table)
    for site in sites:
        if site.block is None:
            console.print(f"{site.name}: {plan.settings[site.name].label}")
    console.print()
    for line in plan.lines(source.nbytes):
        console.print(line)


def frontier_table(plans: list[Plan], source: Source) -> None:
    """The best for each size: bytes, predicted KL with its interval, and what more would buy."""
    table = Table("bytes", "of original", "KL", "95%", "next 1% buys", box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for plan in plans:
        kl, low, high = plan.predicted or (plan.cost, plan.cost, plan.cost)
        table.add_row(
            f"{plan.bytes:,}", f"{plan.bytes / source.nbytes:.1%}", f"{kl:.4f}",
            f"{low:.4f}–{high:.4f}", f"{plan.next or 0:.2g}",
        )  # fmt: skip
    Console(highlight=False).print(table)


def dry_run_table(recipe: Recipe, as_json: bool) -> None:
    """What ``compress apply --dry-run`` finds, as a table or as one JSON object."""
    from dataclasses import asdict

    from compress.calibration import check_text
    from compress.preflight import preflight
    from compress.source import Source

    source = Source(recipe.model, untie=recipe.untie)
    plan = preflight(recipe, source)
    check_text(recipe, source)
    if as_json:
        print(json.dumps(asdict(plan)))
        return
    preflight_table(plan)
