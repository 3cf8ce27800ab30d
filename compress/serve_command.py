"""``compress serve``: an OpenAI-compatible endpoint, by a server that is there already."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from compress.arguments import Quiet
from compress.display import screen
from compress.errors import CheckpointError, ModelError, RecipeError

SERVERS = ("transformers", "vllm")


def serve(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint folder, or demo.")],
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="Who may ask: by default this machine.")] = "127.0.0.1",
    server: Annotated[
        str | None, typer.Option(help="transformers or vllm. Default: vllm where it can.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run the modelling file in the folder, where it has one.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Answer OpenAI's clients at http://HOST:PORT/v1, with transformers' server or vLLM's.

    [bold]compress serve ./my-model-int4 --port 8000[/]
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    from compress.source import resolve

    line = command(resolve(folder), host, port, server, trust_remote_code)
    if not quiet:
        screen.print(f"http://{host}:{port}/v1 by {line[2].partition('.')[0]}; Ctrl-C ends it")
        if not chats(resolve(folder)):
            screen.print("it has no chat template: ask /v1/completions, not /v1/chat/completions")
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # transformers lists what is in it
    os.execv(line[0], line)


def chats(folder: Path) -> bool:
    """Whether the tokenizer says how a conversation is written."""
    from compress.source import read_json

    files = [folder / name for name in ("chat_template.jinja", "chat_template.json")]
    known = read_json(folder / "tokenizer_config.json").get("chat_template")
    return bool(known) or any(file.exists() for file in files)


def command(
    folder: Path, host: str, port: int, server: str | None, trust_remote_code: bool
) -> list[str]:
    """The command line that serves ``folder``.

    Raises:
        RecipeError: an unknown server. ModelError: not a folder that it loads.
        CheckpointError: it is not installed.
    """
    from compress.source import read_json

    if server not in (None, *SERVERS):
        raise RecipeError(f"--server {server}: {' or '.join(SERVERS)}")
    config = read_json(folder / "config.json")
    if not config:
        raise ModelError(f"{folder}: no config.json, so this is not a model folder")
    own_code = "auto_map" in config
    if own_code and not trust_remote_code:
        raise ModelError(
            f"{folder} brings its own modelling file, which a server runs only with "
            f"--trust-remote-code; or write a folder without: compress export {folder} --to dense"
        )
    if server is None:
        server = "vllm" if find_spec("vllm") and not own_code else "transformers"
    trust = ["--trust-remote-code"] if own_code else []
    start = [sys.executable, "-m"]
    where = ["--host", host, "--port", str(port)]
    if server == "vllm":
        if not find_spec("vllm"):
            raise CheckpointError("vllm is not installed: pip install vllm")
        return [
            *start,
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(folder),
            *where,
            *trust,
        ]
    missing = [name for name in ("fastapi", "uvicorn") if not find_spec(name)]
    if missing:
        raise CheckpointError(
            f"{' and '.join(missing)} not installed, which transformers' server needs: "
            "pip install 'compresskit[serve]'"
        )
    return [*start, "transformers.cli.transformers", "serve", str(folder), *where, *trust]
