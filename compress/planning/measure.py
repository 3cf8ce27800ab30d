"""What a plan really costs: applied, and compared with the original on text it did not read."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from compress.assemble import assemble
from compress.calibration import text
from compress.checkpoint import load_tokenizer
from compress.compressors.distillation.losses import forward_kl, log_probabilities
from compress.layerwise import solve
from compress.memory import keep_large
from compress.objective import IGNORED, Examples, examples
from compress.planning.shapes import Shape
from compress.recipe import Recipe
from compress.sensitivity import Sensitivity
from compress.source import Original, Source
from compress.store import Blocks, Store

HELD = 32  # windows of calibration text, behind those that a recipe reads
FEWEST = 4


def held_out(recipe: Recipe, source: Source) -> Examples | None:
    """Calibration windows that the recipe does not read; None if the text has too few."""
    wanted = recipe.calibration
    read = text(recipe, source, wanted.samples + HELD, wanted.length)
    tokens, sizes = read.tokens[wanted.samples :], read.token_bytes[wanted.samples :]
    if len(tokens) < FEWEST:
        return None
    return examples(source.skeleton, tokens, sizes, load_tokenizer(source.folder), seed=recipe.seed)


def measure(
    recipe: Recipe,
    shape: Shape,
    held: Examples,
    known: dict[str, Sensitivity] | None = None,
) -> tuple[float, float]:
    """KL(original ‖ compressed) in nats a token after the recipe's last stage, and its error.

    Those before it made ``shape``. The stage is applied as ``compress apply`` does, with the loss's
    gradients as far as they are ``known``. Both models are in memory, as float32.
    """
    number = len(shape.stages)
    torch.manual_seed(recipe.seed * 1000 + number)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / f"stage-{number}")
        events = solve(
            number, recipe.stages[number], recipe, shape.source, shape.blocks, store, known
        )
        for _ in events:
            pass
        return divergence(shape.source, store, held)


def divergence(source: Source, blocks: Blocks, held: Examples) -> tuple[float, float]:
    """KL(original ‖ model) in nats a token, of a model in blocks, and its error."""
    keep_large()
    small = assemble(source, blocks, torch.float32)
    whole = source.original
    original = assemble(whole, Original(whole), torch.float32)
    assert held.targets is not None
    windows: list[Tensor] = []
    with torch.no_grad():
        for row in range(len(held)):
            one = slice(row, row + 1)
            counted = held.targets[one] != IGNORED
            p, q = (held.call(model, one).logits[counted] for model in (original, small))
            kl = forward_kl(log_probabilities(p.float()), log_probabilities(q.float()))
            windows.append(kl.double().mean())
    found = torch.stack(windows)
    return found.mean().item(), (found.std() / len(found) ** 0.5).item()
