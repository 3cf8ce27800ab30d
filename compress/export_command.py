"""``compress export``: a model folder in another format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.arguments import Json, Overwrite, Quiet, Sets, overrides
from compress.display import exports_table, screen
from compress.errors import RecipeError


def export(
    folder: Annotated[
        str | None, typer.Argument(metavar="DIR", help="A checkpoint folder, or demo.")
    ] = None,
    to: Annotated[str | None, typer.Option(metavar="FORMAT", help="See --list.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file or folder to write.")] = None,
    sets: Sets = None,
    overwrite: Overwrite = False,
    verify: Annotated[
        bool, typer.Option(help="Compare the logits with the folder's before it appears.")
    ] = True,
    list_all: Annotated[
        bool, typer.Option("--list", help="Which kinds of weight each format holds.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in another format, and check that it gives the same logits there.

    [bold]compress export ./my-model-int4 --to gguf --out my-model.gguf[/]
    """
    from compress import registry
    from compress.export.base import Exporter
    from compress.export.export import export as exported
    from compress.export.vllm import VERSION

    if list_all:
        names = registry.available(registry.EXPORTERS)
        exports_table(
            [registry.find(n, registry.EXPORTERS, Exporter) for n in names],  # type: ignore[type-abstract]
            as_json,
        )
        return
    if folder is None or to is None or out is None:
        raise RecipeError("compress export DIR --to FORMAT --out PATH, or compress export --list")
    options = overrides(None, None, None, sets)
    done = exported(folder, to, out, overwrite=overwrite, verify=verify, **options)
    if as_json:
        typer.echo(json.dumps(done))
    elif not quiet:
        held = ", ".join(f"{count} matrices {how}" for how, count in done["held"].items())
        screen.print(f"{out}: {done['bytes']:,} bytes; {held}", highlight=False)
        if done["inputs"].startswith("not"):
            screen.print(f"what they read is {done['inputs']}", highlight=False)
        if "vllm" in done:
            screen.print(f"vLLM {VERSION} {done['vllm']}", highlight=False)
        if "difference" in done:
            screen.print(f"logits within {done['difference']:.1e} of the folder's")
