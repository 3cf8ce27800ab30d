"""``compress generate``: text from a checkpoint, as it is written."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from compress.arguments import Quiet
from compress.display import screen
from compress.errors import ModelError, RecipeError
from compress.products import fast_products


def generate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint folder, or demo.")],
    prompt: Annotated[str, typer.Argument(help="What comes before.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    runtime: Annotated[
        str | None,
        typer.Option(help="transformers, packed or onnx. Default: packed where kernels are."),
    ] = None,
    raw: Annotated[
        bool, typer.Option(help="Go on with the prompt, also where there is a chat template.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write what comes after a prompt; speed is said on standard error.

    [bold]compress generate ./my-model-int4 "def main():" --max-new-tokens 64[/]
    """
    import torch

    from compress.checkpoint import load, load_tokenizer
    from compress.source import resolve

    if not prompt:
        raise RecipeError("the prompt is empty; write at least a word")
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ModelError(f"{folder}: has no tokenizer, so it takes no text")
    chosen = runtime or preferred(resolve(folder))
    model: Any = load(folder, runtime=chosen)
    if not model.can_generate():
        raise ModelError(f"{folder}: {type(model).__name__} writes no text")
    report = getattr(model, "packed_report", None)
    if report is not None and not quiet:
        screen.print(f"[dim]{chosen}: {'; '.join(report.lines())}[/]", soft_wrap=True)
    ids = _tokens(tokenizer, prompt, raw)
    streamer = _timed(tokenizer)
    torch.manual_seed(seed)
    drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode(), fast_products():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            **drawn,
        )
    if not quiet:
        screen.print(f"[dim]{_speed(ids.shape[1], streamer.times)}[/]")


def preferred(folder: Any) -> str:
    """The runtime that suits a folder: packed where a kernel takes weights as they are stored."""
    from compress.runtime.packed import KERNELS, kinds

    return "packed" if folder.is_dir() and kinds(folder) & set(KERNELS) else "transformers"


def _tokens(tokenizer: Any, prompt: str, raw: bool) -> Any:
    """int64 [1, length]: the prompt, or a chat that it opens."""
    if tokenizer.chat_template and not raw:
        message = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    return tokenizer(prompt, return_tensors="pt")["input_ids"]


def _timed(tokenizer: Any) -> Any:
    """transformers' streamer to standard output, which keeps the time of every token."""
    from transformers import TextStreamer

    class Timed(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())  # the prompt is put first, then each token
            super().put(value)

    return Timed()


def _speed(prompt: int, times: list[float]) -> str:
    start, *tokens = times
    if not tokens:
        return f"{prompt} tokens read, none written"
    text = f"{prompt} tokens read at {prompt / (tokens[0] - start):.1f} tokens/s"
    if len(tokens) > 1:
        speed = (len(tokens) - 1) / (tokens[-1] - tokens[0])
        text += f", {len(tokens)} written at {speed:.1f} tokens/s"
    return text
