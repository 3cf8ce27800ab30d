"""The command line's options, each with its help, and what several of them are turned into."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from compress.errors import RecipeError
from compress.memory import ASKED
from compress.sizes import parse_size


def limit_memory(asked: str | None) -> str | None:
    """For this process and those that it starts.

    Raises:
        RecipeError: it is no size.
    """
    if asked:
        parse_size(asked, 100)
        os.environ[ASKED] = asked
    return asked


Recipes = Annotated[list[Path] | None, typer.Argument(metavar="RECIPE…", help="YAML recipe files.")]
Folders = Annotated[list[str], typer.Argument(metavar="DIR…", help="Checkpoint folders, or demo.")]
Model = Annotated[str | None, typer.Option(help="Folder, hub id, or demo; overrides the recipe.")]
Data = Annotated[
    str | None, typer.Option(help="demo, a text file or folder, or name:config:split:column.")
]
Size = Annotated[
    str | None,
    typer.Option(help="30%, 300MB: bits of the first stage by it; without RECIPE gptq of all."),
]
Seed = Annotated[int | None, typer.Option(help="Overrides the recipe's seed.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="e.g. stages.0.bits=3")
]
Memory = Annotated[
    str | None,
    typer.Option(
        envvar=ASKED,
        callback=limit_memory,
        help="What the process may take, e.g. 2GB or 30%: what waits beyond that is on disk.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]
Verify = Annotated[
    bool,
    typer.Option(
        help="Load the result in a process of its own before it appears; takes the memory of the "
        "whole model."
    ),
]
Overwrite = Annotated[bool, typer.Option(help="Replace an output that exists.")]
Samples = Annotated[int, typer.Option(min=1, help="Windows of evaluation text.")]
Limit = Annotated[int | None, typer.Option(min=2, help="Questions or examples, at most.")]
Tasks = Annotated[
    str | None, typer.Option(help="Of lm-evaluation-harness: names or YAML files, with commas.")
]
Dataset = Annotated[
    str | None, typer.Option(help="Rows with labels: a file, a folder, or name:config:split.")
]
Columns = Annotated[
    str | None, typer.Option(metavar="ROLE=NAME,…", help="Of the data set: text, image, label.")
]
Length = Annotated[int | None, typer.Option(min=8, help="Tokens in a window.")]


PLANNED: dict[str, Any] = {  # what --size alone stands for
    "stages": [{"use": "gptq", "targets": ["all"], "budget": {"families": ["quantization"]}}]
}


def names(commas: str | None) -> list[str]:
    """``"a, b"`` → ``["a", "b"]``."""
    return [name.strip() for name in (commas or "").split(",") if name.strip()]


def pairs(commas: str | None, option: str) -> dict[str, str]:
    """``"a=b, c=d"`` → ``{"a": "b", "c": "d"}``.

    Raises:
        RecipeError: something between the commas is not KEY=VALUE.
    """
    found = dict(item.partition("=")[::2] for item in names(commas))
    if not all(found.values()):
        raise RecipeError(f"{option} {commas}: write KEY=VALUE, with commas between")
    return found


def overrides(
    model: str | None,
    data: str | None,
    seed: int | None,
    sets: list[str] | None,
    size: str | None = None,
) -> dict[str, Any]:
    """Dotted paths into a recipe, and the values that are to stand there.

    Raises:
        RecipeError: an item of ``--set`` is not KEY=VALUE.
    """
    given: dict[str, Any] = {"model": model, "calibration.data": data, "seed": seed}
    given["stages.0.budget.size"] = size
    found = {key: value for key, value in given.items() if value is not None}
    for item in sets or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {item}: write KEY=VALUE, e.g. stages.0.bits=3")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {item}: '{value}' is not YAML; quote it") from error
    return found
