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
    quiet: Quiet = False,
) -> None:
    """Answer OpenAI's clients at http://HOST:PORT/v1, with transformers' server or vLLM's.

    [bold]compress serve ./my-model-int4 --port 8000[/]
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    from compress.source import resolve

    line = command(resolve(folder), host, port, server)
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


def command(folder: Path, host: str, port: int, server: str | None) -> list[str]:
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
    if "auto_map" in config:  # transformers' server looks the class up in transformers alone
        raise ModelError(
            f"{folder} brings its own modelling file, which servers do not run; write a folder "
            f"without one: compress export {folder} --to dense --out DIR"
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: no safetensors file, which servers load; serve the folder it was made from"
        )
    installed, refused = find_spec("vllm") is not None, None
    if installed and server != "transformers":
        from compress.export import vllm
        from compress.stored import Stored

        refused = vllm.refusal(Stored(folder))
    server = server or ("vllm" if installed and not refused else "transformers")
    start = [sys.executable, "-m"]
    where = ["--host", host, "--port", str(port)]
    if server == "vllm":
        if not installed:
            raise CheckpointError("vllm is not installed: pip install vllm")
        if refused:
            raise ModelError(f"{folder}: vLLM does not run it: {refused}")
        module = "vllm.entrypoints.openai.api_server"
        return [*start, module, "--model", str(folder), *where]
    missing = [name for name in ("fastapi", "uvicorn") if not find_spec(name)]
    if missing:
        raise CheckpointError(
            f"{' and '.join(missing)} not installed, which transformers' server needs: "
            "pip install 'compresskit[serve]'"
        )
    return [*start, "transformers.cli.transformers", "serve", str(folder), *where]
