"""Whether each stage of a recipe can take what those before it leave."""

from __future__ import annotations

from collections.abc import Sequence

from compress.anatomy import Anatomy
from compress.compressors.base import (
    RotationCompressor,
    StructureCompressor,
    TransformCompressor,
)
from compress.compressors.structure.hidden import Hidden
from compress.errors import ModelError, RecipeError
from compress.recipe import Stage


def check_order(
    stages: Sequence[Stage], anatomy: Anatomy, after: Sequence[Anatomy] = ()
) -> dict[str, str]:
    """Follow every site's kind of weight through the stages; the final kind of each site.

    ``after`` holds the anatomy that each stage leaves, if some leave another.

    Raises:
        RecipeError: a stage takes a site whose weight is of a kind that it cannot start from.
        ModelError: a stage would turn a table that is embedding and head at once.
    """
    kinds = {site.name: "dense" for site in anatomy.sites}
    last = {site.name: "the original model" for site in anatomy.sites}
    changed = ""
    for number, stage in enumerate(stages):
        if changed and stage.compressor.restores:
            raise RecipeError(
                f"stages.{number} ({stage.use}) cannot follow {changed}, which leaves other "
                "matrices than the original model's that it restores"
            )
        chosen = stage.sites(anatomy)
        if isinstance(stage.compressor, (RotationCompressor, Hidden)):
            check_untied(anatomy)
        if isinstance(stage.compressor, (TransformCompressor, StructureCompressor)):
            changed = f"stages.{number} ({stage.use})"
        if isinstance(stage.compressor, StructureCompressor):
            tables = "embedding" in stage.compressor.layouts
            chosen = [site for site in anatomy.sites if tables or site.block is not None]
        for site in chosen:
            kind = kinds[site.name]
            compressor = stage.compressor_for(site)
            if kind not in compressor.accepts:
                raise RecipeError(
                    f"stages.{number} ({stage.use}) cannot follow {last[site.name]} on {site.name}:"
                    f" that weight is {kind} by then, and {stage.use} takes "
                    f"{' or '.join(sorted(compressor.accepts))}"
                )
            kinds[site.name] = compressor.result(kind)
            last[site.name] = f"stages.{number} ({stage.use})"
        if after:
            anatomy = after[number]
            kinds = {site.name: kinds.get(site.name, "dense") for site in anatomy.sites}
    return kinds


def check_untied(anatomy: Anatomy) -> None:
    """Refuse to turn a table that is embedding and head at once.

    Raises:
        ModelError: with the names of both.
    """
    for site in anatomy.sites:
        if site.aliases:
            raise ModelError(
                f"{site.aliases[0]} reads the table of {site.name}, and a rotation gives the two "
                "different ones; set untie: true in the recipe"
            )
