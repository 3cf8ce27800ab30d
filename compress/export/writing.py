"""Model folders that exporters write: the weights in a format, and all that lies beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.anatomy import Site
from compress.checkpoint import RECORD, record, weight_files
from compress.formats import Format, Shapes, shapes_of
from compress.stored import Stored
from compress.weights import Weight
from compress.writer import Shards, copy_companions, model_card, sha256


def write_folder(
    stored: Stored, out: Path, how: Format, weight: Callable[[Site], Weight], **changes: Any
) -> None:
    """A model folder in the format ``how``, block by block, with ``changes`` of its config."""
    out.mkdir()
    shards = Shards(out)
    shapes: Shapes = {}
    for block in stored.anatomy.blocks:
        for site in block.sites:
            made = weight(site)
            shapes[site.name] = shapes_of(made)
            for name, tensor in how.tensors(site, made).items():
                shards.add(name, tensor)
        inside = {site.parameter for site in block.sites}
        for name in block.tensors:
            if name not in inside:
                shards.add(name, stored.tensor(name))
    shards.close()
    config = stored.plain_config() | changes
    how.configure(config, shapes)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_companions(stored.folder, out)
    how.write_files(out)
    keep_record(stored.folder, out, how.name, how.needs)


def uneven(stored: Stored) -> str | None:
    """Why a model of layers of several shapes needs the modelling file."""
    shapes = getattr(stored.config, "compressed_shapes", None)
    if not shapes:
        return None
    return (
        f"{next(iter(shapes))} has a shape that no config of {stored.config.model_type} "
        "expresses; only the folder's own modelling file does"
    )


def keep_record(folder: Path, out: Path, storage: str, loads_with: str) -> None:
    """Recipe, record and card of a compressed folder, for another folder of the same model."""
    info = record(folder)
    if not info:
        return
    files = weight_files(out)
    info |= {"storage": storage, "loads_with": loads_with, "exported": storage}
    info["bytes"] = info["bytes"] | {"disk": sum(file.stat().st_size for file in files)}
    info["files"] = {file.name: sha256(file) for file in files}
    (out / RECORD).write_text(json.dumps(info, indent=1) + "\n")
    (out / "README.md").write_text(model_card(info))
    if (folder / "recipe.yaml").is_file():
        (out / "recipe.yaml").write_bytes((folder / "recipe.yaml").read_bytes())
