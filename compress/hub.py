"""``compress push``: a checkpoint folder to the Hugging Face hub, its model card checked first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compress.arguments import Json, Quiet
from compress.display import screen
from compress.errors import CheckpointError, RecipeError, first_line

IGNORED = ["*.tmp", ".*", "*/.*"]


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.")],
    to: Annotated[str, typer.Option(metavar="USER/NAME", help="The repository on the hub.")],
    private: Annotated[bool, typer.Option(help="If it is made now, for you alone.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload by compresskit",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a checkpoint to the Hugging Face hub: weights, recipe, model card and results.

    [bold]compress push ./my-model-int4 --to me/my-model-int4[/]
    """
    link = upload(folder, to, private=private, message=message)
    if as_json:
        import json

        typer.echo(json.dumps({"folder": str(folder), "to": to, "url": link}))
    elif not quiet:
        screen.print(f"{folder} is now {link}")


def upload(folder: Path, to: str, *, private: bool = False, message: str = "") -> str:
    """Make the repository if it is not there, and put the folder's files into one commit; its URL.

    Raises:
        RecipeError: ``to`` is no name of a repository.
        ModelError: not a model folder. CheckpointError: its card is not valid, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from compress.source import read_config

    try:
        validate_repo_id(to)
        if to.count("/") != 1:
            raise HFValidationError("two names with / between")
    except HFValidationError as error:
        raise RecipeError(f"--to {to}: expected USER/NAME ({error})") from error
    read_config(folder)
    check_card(folder)
    api = HfApi()
    try:
        api.create_repo(to, private=private, exist_ok=True)
        done: Any = api.upload_folder(
            repo_id=to, folder_path=folder, commit_message=message, ignore_patterns=IGNORED
        )
    except Exception as error:  # of whatever client speaks to the hub: refused, offline, timed out
        reason = first_line(error, 200)
        raise CheckpointError(
            f"{folder}: the hub did not take it as {to} ({reason}); `hf auth login` first, and "
            "check that the name is yours"
        ) from error
    return str(getattr(done, "repo_url", "") or done)


def check_card(folder: Path) -> dict[str, Any]:
    """The metadata of the folder's model card.

    Raises:
        CheckpointError: there is no card, or its metadata is not what the hub reads.
    """
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        raise CheckpointError(f"{path}: no model card; `compress apply` writes one")
    try:
        data = ModelCard.load(path).data.to_dict()
    except Exception as error:
        raise CheckpointError(f"{path}: its metadata is not a model card's: {error}") from error
    if not data.get("library_name"):
        raise CheckpointError(f"{path}: its metadata names no library_name; add the --- block")
    return data
