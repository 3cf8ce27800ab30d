"""The text that a recipe's stages read, and whether the model can read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress import distributed
from compress.anatomy import matches
from compress.checkpoint import load_tokenizer
from compress.compressors.base import (
    CalibratedCompressor,
    ScalingCompressor,
    StructureCompressor,
    TrainingCompressor,
)
from compress.data import Windows, windows
from compress.errors import DataError, ModelError, NotMeasurable
from compress.objective import examples, family, window_length
from compress.recipe import Recipe, Stage
from compress.source import Source, read_config, resolve

TOKENS = 512, 2048  # in one forward pass, at least and at most
BYTES = 3 << 19  # of its widest tensor: few enough for the processor's cache, and for few new pages
READERS = (CalibratedCompressor, ScalingCompressor, StructureCompressor)  # they look at activations


def calibrates(stage: Stage, recipe: Recipe, source: Source) -> bool:
    """Whether a stage runs the model on text: it would, there is some, and the model reads it."""
    if not isinstance(stage.compressor, READERS):
        return False
    try:
        family(source.skeleton)
    except NotMeasurable:
        return False
    return bool(recipe.data)


def text(recipe: Recipe, source: Source, samples: int, length: int | None) -> Windows:
    """``samples`` windows of the calibration part.

    Raises:
        DataError: no text, no tokenizer, or longer windows than the model takes.
    """
    return windows(
        recipe.data,
        load_tokenizer(source.folder),
        part="calibration",
        samples=samples,
        length=window_length(source.config.to_dict(), length),
        seed=recipe.seed,
    )


def forward_passes(
    recipe: Recipe, source: Source, *, shared: bool = True
) -> list[Callable[[nn.Module], Any]]:
    """This process' share of the calibration text, in passes of ``TOKENS``, fewer of wide layers.

    All of it if it is not ``shared``: what one process does for all needs the whole text.
    """
    wanted = recipe.calibration
    read = text(recipe, source, wanted.samples, wanted.length)
    asked = examples(
        source.skeleton,
        read.tokens,
        read.token_bytes,
        load_tokenizer(source.folder),
        seed=recipe.seed,
    )
    mine = range(len(asked))
    if shared:
        mine = mine[distributed.rank() :: distributed.size()]
    if not mine:
        raise DataError(f"{recipe.data}: {len(asked)} windows for {distributed.size()} processes")
    inner = [site for site in source.anatomy.sites if matches(site, "blocks")]
    widest = max((max(site.shape) for site in inner), default=1)
    least, most = TOKENS
    count = min(most, max(least, BYTES // (widest * source.dtype.itemsize)))
    size = max(1, count // read.tokens.shape[1])

    def forward(rows: Tensor) -> Callable[[nn.Module], Any]:
        inputs = {name: ids[rows] for name, ids in asked.inputs.items()}
        return lambda model: model(**inputs, **asked.options)

    return [forward(rows) for rows in torch.tensor(mine).split(size)]


def check_text(recipe: Recipe, source: Source) -> None:
    """What reads text must have it, and what trains on text a model that predicts it.

    Raises:
        DataError, ModelError: before any work is done.
    """
    for stage in recipe.stages:
        compressor = stage.compressor
        if isinstance(compressor, TrainingCompressor):
            if family(source.skeleton) == "other":
                name = source.model_class.__name__
                raise ModelError(f"{stage.use} trains on text, which {name} does not predict")
            wanted: tuple[int, int | None] = compressor.tokens()
            if compressor.teacher and recipe.data:
                check_teacher(compressor.teacher, recipe, source, wanted[1])
        elif isinstance(compressor, READERS):
            if not compressor.needs_text and not calibrates(stage, recipe, source):
                continue
            family(source.skeleton)
            wanted = 1, recipe.calibration.length
        else:
            continue
        if not recipe.data:
            raise DataError(
                f"{stage.use} needs text: set calibration.data in the recipe, or --data"
            )
        text(recipe, source, min(wanted[0], 2), wanted[1])


def check_teacher(teacher: str, recipe: Recipe, source: Source, length: int | None) -> None:
    """What another model says of tokens can be learnt only if it means the same tokens.

    Raises:
        ModelError: it is no model folder, or reads the text as other tokens. DataError: longer
        windows than it takes.
    """
    folder = resolve(teacher)
    ours = text(recipe, source, 2, length)
    own, theirs = load_tokenizer(source.folder), load_tokenizer(folder)
    window_length(read_config(folder).to_dict(), length)
    same = own is not None and theirs is not None and own.get_vocab() == theirs.get_vocab()
    if same:
        read = windows(
            recipe.data, theirs, part="calibration", samples=2, length=ours.tokens.shape[1],
            seed=recipe.seed,
        )  # fmt: skip
        same = read.hash == ours.hash
    if not same:
        raise ModelError(
            f"teacher {teacher} reads text as other tokens than {source.name}; distillation of "
            "predictions needs one tokenizer for both: choose a teacher of the same family"
        )
