"""Everything that can be known before a weight is read: what a recipe would do, and need."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from compress.anatomy import Site
from compress.calibration import calibrates, check_text
from compress.compressors.base import LayerCompressor, Shape, TrainingCompressor
from compress.compressors.structure.depth import Depth
from compress.compressors.structure.hidden import Hidden
from compress.errors import CheckpointError, CompressError
from compress.objective import window_length
from compress.order import check_order
from compress.recipe import Recipe
from compress.shape import sources
from compress.source import Source
from compress.zero import check_launcher


@dataclass(frozen=True)
class StagePlan:
    """One stage: the sites it takes and their bytes, by the compressor's own prediction."""

    use: str
    sites: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Preflight:
    """What applying a recipe takes, in bytes; ``memory`` and ``disk`` are estimates."""

    stages: list[StagePlan]
    model_before: int
    model_after: int
    memory: int
    disk: int


def preflight(recipe: Recipe, source: Source) -> Preflight:
    """Check a recipe against a model and add up what it needs; reads no weight.

    Raises:
        RecipeError: a pattern matches nothing, a stage cannot follow another, or the launcher is
            not one that training runs under.
        ModelError: a stage cannot take this model.
    """
    training = [s.compressor for s in recipe.stages if isinstance(s.compressor, TrainingCompressor)]
    if training:
        check_launcher(muon=any(getattr(c, "optimizer", None) == "muon" for c in training))
    first, *rest = sources(recipe, source)
    check_order(recipe.stages, first.anatomy, [model.anatomy for model in rest])
    pieces: dict[str, list[Shape]] = {site.name: [site.shape] for site in first.anatomy.sites}
    size = {site.name: site.nbytes for site in first.anatomy.sites}
    plans = []
    model = first
    for stage, then in zip(recipe.stages, rest, strict=True):
        chosen = stage.sites(model.anatomy)
        before = sum(size[site.name] for site in chosen)
        for site in chosen:
            compressor = stage.compressor_for(site)
            if isinstance(compressor, LayerCompressor):
                _follow(compressor, site, pieces, size)
        if then is not model:  # of what a structural stage takes all is dense
            same = set(model.anatomy.blocks[0].sites) & set(then.anatomy.blocks[0].sites)
            outside = {site.name for site in same}
            kept = {s.name: s for s in then.anatomy.sites if s.name not in outside}
            size = {n: b for n, b in size.items() if n in outside}
            size |= {name: site.nbytes for name, site in kept.items()}
            pieces |= {name: [site.shape] for name, site in kept.items()}
        model = then
        plans.append(
            StagePlan(
                stage.use, len(chosen), before, sum(size.get(site.name, 0) for site in chosen)
            )
        )
    whole = sum(shape.numel() * dtype.itemsize for _, shape, dtype in first.headers())
    last = sum(shape.numel() * dtype.itemsize for _, shape, dtype in model.headers())
    after = last - sum(site.nbytes for site in model.anatomy.sites) + sum(size.values())
    return Preflight(
        plans, whole, after, _memory(recipe, [first, *rest]), _disk(recipe, whole, after)
    )


def _follow(
    compressor: LayerCompressor, site: Site, pieces: dict[str, list[Shape]], size: dict[str, int]
) -> None:
    """Predicted matrices and bytes of one site after ``compressor``."""
    shapes = pieces[site.name]
    size[site.name] = sum(compressor.predict(shape, site.dtype) for shape in shapes)
    pieces[site.name] = [piece for shape in shapes for piece in compressor.pieces(shape)]


def _memory(recipe: Recipe, models: list[Source]) -> int:
    """One block as stored, and about six float32 copies of its largest matrix while it is solved.

    A calibrated stage holds besides what all tokens have put out where they wait, about two hidden
    states and two of the widest matrix' inputs each, in both models, and the moments of these
    inputs with their factors. A training stage holds the model four times in float32 (weights,
    gradient, AdamW's two moments), its best values, and the teacher. One that drops blocks holds
    it twice, one that narrows its stream as well, with what the gradient needs.
    """
    source = models[0]
    training = any(isinstance(s.compressor, TrainingCompressor) for s in recipe.stages)
    if training:
        return 6 * 4 * source.parameters
    streamed = 0
    if any(isinstance(s.compressor, (Depth, Hidden)) for s in recipe.stages):
        streamed = 2 * 4 * source.parameters
    for block in source.anatomy.blocks:
        stored = sum(site.nbytes for site in block.sites)
        largest = max((site.shape[0] * site.shape[1] for site in block.sites), default=0)
        streamed = max(streamed, 2 * stored + 6 * 4 * largest)
    return streamed + _activations(recipe, models)


def _activations(recipe: Recipe, models: list[Source]) -> int:
    """What the passes over the calibration text hold, in float32."""
    found = zip(recipe.stages, models[:-1], strict=True)
    stages = [(stage, model) for stage, model in found if calibrates(stage, recipe, model)]
    if not stages:
        return 0
    source, calibration = models[0], recipe.calibration
    tokens = calibration.samples * window_length(source.config.to_dict(), calibration.length)
    sites = [site for stage, model in stages for site in stage.sites(model.anatomy)]
    widths = [site.shape[1] for site in sites if site.layout != "embedding"] or [0]
    return 4 * (2 * tokens * (2 * min(widths) + 2 * max(widths)) + 8 * max(widths) ** 2)


def _disk(recipe: Recipe, whole: int, after: int) -> int:
    """The result, and the blocks of two stages while one is made from the other."""
    work = min(len(recipe.stages), 2) * whole
    training = [s.compressor for s in recipe.stages if isinstance(s.compressor, TrainingCompressor)]
    return after + work + (10 * whole if training else 0) + sum(c.disk() for c in training)


def check_variants(variants: dict[str, Recipe]) -> dict[str, Source]:
    """Check all recipes before the first is applied; returns the model of each, opened once.

    Raises:
        CompressError: as ``preflight`` and ``check_text`` do, after the name of the variant.
    """
    opened: dict[tuple[str, bool], Source] = {}
    found = {}
    for name, recipe in variants.items():
        key = (recipe.model, recipe.untie)
        if key not in opened:
            opened[key] = Source(recipe.model, untie=recipe.untie)
        try:
            preflight(recipe, opened[key])
            check_text(recipe, opened[key])
        except CompressError as error:
            raise type(error)(f"{name}: {error}") from error
        found[name] = opened[key]
    return found


def check_output(out: Path, *, overwrite: bool = False, file: bool = False) -> None:
    """Refuse an output (a folder, or a ``file``) that exists or cannot be made.

    Raises:
        CheckpointError: with what to do about it.
    """
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; give another --out, or --overwrite")
    if out.exists() and out.is_dir() == file:
        kinds = ("file", "folder")
        raise CheckpointError(f"{out} is a {kinds[file]}; --out names a {kinds[not file]}")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise CheckpointError(f"{out}: {parent} is a file, so no folder can be made in it")
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"{out}: no permission to write in {parent}")


def check_disk(out: Path, needed: int) -> None:
    """Refuse to begin what would not fit on the disk."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"{out}: needs about {needed / 1e9:.1f} GB of disk, "
            f"{free / 1e9:.1f} GB are free on {parent}"
        )
