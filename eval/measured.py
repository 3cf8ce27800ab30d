"""A checkpoint folder as a report sees it: its results, its recipe, its family, its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from compress import checkpoint, gguf_file
from compress.checkpoint import weight_files
from compress.errors import CheckpointError
from eval.metrics.base import read_config
from eval.results import Result, read

WHERE = {"use", "targets", "skip", "blocks", "budget"}  # a stage's keys that are not the method's


@dataclass(frozen=True)
class Measured:
    """One checkpoint folder. A plain Hugging Face folder has no ``record`` and no ``recipe``."""

    folder: Path
    name: str
    record: dict[str, Any]
    """``compression.json``, or empty."""
    recipe: str
    """YAML text, or empty."""
    stages: list[dict[str, Any]]
    results: dict[str, Result]
    size: float | None
    """Bytes of weights on disk."""
    stored: str = ""
    """How another toolkit packed the weights: ``gptq 4 bits``, ``gguf Q4_K``; empty if none did."""

    def value(self, metric: str) -> float | None:
        """The metric's value; None when absent or not a finite number."""
        result = self.results.get(metric)
        if result is None or result.value is None or not math.isfinite(result.value):
            return None
        return result.value

    @property
    def is_original(self) -> bool:
        """Whether nothing was done to it."""
        return not self.stages and not self.record.get("sites") and not self.stored

    @property
    def family(self) -> str:
        """What kind of compression made it; a key of ``eval.chart.FAMILIES``."""
        if self.is_original:
            return "original"
        if self.stored and not self.stages:
            return "quantization"
        known = self.record.get("families", {})
        families = {known.get(str(stage.get("use")), "other") for stage in self.stages}
        compressing = families - {"distillation"}
        if len(compressing) > 1:
            return "chain"
        if not compressing:
            return "distillation" if families else "other"
        (only,) = compressing
        return f"healed {only}" if len(families) > 1 and only != "other" else only

    def continues(self, other: Measured) -> bool:
        """Whether its stages are those of ``other`` and then more."""
        count = len(other.stages)
        same = self.record.get("base") == other.record.get("base")
        return 0 < count < len(self.stages) and same and self.stages[:count] == other.stages

    @property
    def recipe_line(self) -> str:
        """The recipe in one line: ``rtn bits=4 group=64 → lora rank=8``."""
        said = self.record.get("summary") or " → ".join(map(_stage_line, self.stages))
        return said or self.stored

    @property
    def final_sites(self) -> list[dict[str, Any]]:
        """One record per site: its last, with the bytes from before the first stage."""
        sites: dict[str, dict[str, Any]] = {}
        for site in self.record.get("sites", []):
            before = sites.get(site["name"], site).get("bytes_before")
            sites[site["name"]] = site | {"bytes_before": before}
        return list(sites.values())

    @property
    def relative_error_max(self) -> float | None:
        """The largest relative output error of a site."""
        errors = [site.get("relative_error") for site in self.final_sites]
        return max((error for error in errors if error is not None), default=None)


def read_checkpoint(folder: Path) -> Measured:
    """Everything a report needs from ``folder``.

    Raises:
        CheckpointError: the folder has no results, or a file in it cannot be understood.
    """
    if not folder.exists():
        raise CheckpointError(
            f"{folder}: no such folder, and only folders keep results; a recipe without stages, "
            "or a variant `dense: []`, makes one of a model"
        )
    results = read(folder)
    if not results:
        raise CheckpointError(f"{folder}: no results; run `compress eval {folder}` first")
    record = checkpoint.record(folder)
    path = folder / "recipe.yaml"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text and record.get("recipe"):
        text = yaml.safe_dump(record["recipe"], sort_keys=False)
    by_metric = {result.metric: result for result in results}
    return Measured(
        folder=folder,
        name=str(record.get("name") or folder.resolve().name),
        record=record,
        recipe=text,
        stages=_stages(record, text, path),
        results=by_metric,
        size=_size(folder, record, by_metric.get("size_bytes")),
        stored="" if record.get("sites") else _stored(folder),
    )


def with_unique_names(checkpoints: Sequence[Measured]) -> list[Measured]:
    """Checkpoints that share a name are called by their folders."""
    names = [checkpoint.name for checkpoint in checkpoints]
    return [
        replace(checkpoint, name=str(checkpoint.folder))
        if names.count(checkpoint.name) > 1
        else checkpoint
        for checkpoint in checkpoints
    ]


def _stored(folder: Path) -> str:
    """What a GGUF file's types or config.json's ``quantization_config`` say of the packing."""
    packed = gguf_file.find(folder)
    if packed is not None:
        (kind, _), *_ = gguf_file.tensors(packed).most_common()
        return "" if kind in ("F32", "F16", "BF16") else f"gguf {kind}"
    said = read_config(folder).get("quantization_config")
    if not said:
        return ""
    bits = said.get("bits") or said.get("w_bit") or {True: 8}.get(said.get("load_in_8bit"))
    groups = said.get("config_groups") or {}
    found = {str((g.get("weights") or {}).get("num_bits")) for g in groups.values()}
    bits = bits or ", ".join(sorted(found - {"None"})) or (4 if said.get("load_in_4bit") else "")
    return f"{said.get('quant_method', 'packed')} {bits} bits" if bits else said["quant_method"]


def _stages(record: dict[str, Any], text: str, path: Path) -> list[dict[str, Any]]:
    recipe = record.get("recipe")
    if recipe is None and text:
        try:
            recipe = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise CheckpointError(f"{path}: not YAML; run `compress apply` again") from error
    stages = recipe.get("stages") if isinstance(recipe, dict) else None
    return [stage for stage in stages or [] if isinstance(stage, dict)]


def _size(folder: Path, record: dict[str, Any], measured: Result | None) -> float | None:
    """Measured, else recorded, else that of the weight files."""
    if measured is not None and measured.value:
        return measured.value
    recorded = record.get("bytes", {}).get("disk")
    return recorded or sum(file.stat().st_size for file in weight_files(folder)) or None


def _stage_line(stage: dict[str, Any]) -> str:
    settings = [
        f"{key}={value}"
        for key, value in stage.items()
        if key not in WHERE and value and not isinstance(value, dict | list)
    ]
    return " ".join([str(stage.get("use", "?")), *settings])
