"""``runtime="packed"``: a model whose weights stay as they are stored while it runs.

Built without ever holding the dense weights: the architecture on the meta device, then matrix by
matrix what the folder holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.anatomy import Site
from compress.blockwise import put
from compress.errors import CheckpointError, ModelError
from compress.memory import give_back
from compress.runtime.linear import (
    NoKernel,
    PackedEmbedding,
    PackedLinear,
    Plain,
    matrix_of,
    mostly_zeros,
)
from compress.runtime.matrices import DTYPE, Matrix
from compress.source import read_json
from compress.stored import UNPACKED, Stored
from compress.weights import Weight

# Integers for which there are kernels; rows of tables, too.
GRIDS = ("quantized", "huffman", "masked", "int8", "coded")
KERNELS = (*GRIDS, "lowrank", "sparse")


@dataclass
class Report:
    """How each matrix of a packed model is computed (``model.packed_report``)."""

    kernels: dict[str, str] = field(default_factory=dict)  # site → kernel
    unpacked: dict[str, str] = field(default_factory=dict)  # site → why
    notes: list[str] = field(default_factory=list)  # what is slower or larger than it might be

    def lines(self) -> list[str]:
        """For people: counts, reasons, notes."""
        counts = Counter(self.kernels.values())
        found = [", ".join(f"{count} × {kernel}" for kernel, count in counts.most_common())]
        for reason, count in Counter(self.unpacked.values()).items():
            found.append(f"{count} unpacked, as fast and as large as dense: {reason}")
        return found + self.notes


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in a folder, computing with its weights as they are stored.

    With packed integers it computes in bfloat16, whatever the folder's dtype. ``packed_report`` of
    the model says how each matrix is computed. It stays on the CPU, for whose kernels matrices are
    laid out, and can neither be saved nor trained. No code of the folder is run.

    Raises:
        ModelError: not a model folder, a layout that is not known, or another dtype than the
            kernels'. CheckpointError: tensors are missing.
    """
    stored = Stored(path)
    grids = bool(kinds(stored.folder) & set(GRIDS))
    if grids and dtype not in (None, DTYPE):
        raise ModelError(
            f"{stored.folder}: packed integers are multiplied in bfloat16; leave dtype away, or "
            "load with runtime='transformers'"
        )
    chosen = dtype or (DTYPE if grids else stored.dtype)
    model = stored.new_skeleton()
    model.config.dtype = chosen
    report = Report()
    for block in stored.anatomy.blocks:
        sites = {site.parameter: site for site in block.sites}
        for name in block.tensors:
            if name not in sites:
                tensor = stored.tensor(name)
                cast = tensor.is_floating_point() and name in stored.there
                put(model, stored.anatomy, name, tensor.to(chosen) if cast else tensor)
        for site in block.sites:
            _place(model, stored, site, chosen, report)
        give_back()
    left = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if left:
        raise CheckpointError(f"{stored.folder}: {len(left)} tensors are missing, first {left[0]}")
    stored.set_generation(model)
    report.notes = _notes(model, grids)
    model.__dict__ |= {
        "packed_report": report,
        "save_pretrained": _refuse_to_save,
        "_apply": partial(_apply, model),
    }
    return model.requires_grad_(False).eval()


def _apply(model: PreTrainedModel, fn: Any, recurse: bool = True) -> PreTrainedModel:
    """In place of the model's own, where .to(), .half() and .cuda() pass.

    Raises:
        ModelError: numbers would leave the CPU, or the dtypes that its kernels take.
    """
    for dtype in (DTYPE, torch.float32):
        found = fn(torch.empty(0, dtype=dtype))
        if found.device.type != "cpu":
            raise ModelError(
                f"packed weights are laid out for the CPU's kernels, not for {found.device}; on a "
                "GPU load with runtime='transformers', or serve with vLLM"
            )
        if found.dtype != dtype:
            raise ModelError("a packed model keeps the dtypes that its kernels take")
    return type(model)._apply(model, fn, recurse)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise ModelError(
        "a packed model is for running; the folder that it was loaded from is its file"
    )


def _place(
    model: nn.Module, stored: Stored, site: Site, dtype: torch.dtype, report: Report
) -> None:
    """Put a site's weight into its module, and into those tied to it."""
    weight = stored.weight(site)
    rounding = weight.spec.get("activations")
    dense = weight.dense() if weight.kind in ("dense", "sparse") else None
    matrix: Matrix | None = None
    if dense is None or (site.layout != "embedding" and mostly_zeros(dense)):
        try:
            _check(model, site, weight)
            matrix = matrix_of(weight, dtype)
        except NoKernel as reason:
            report.unpacked[site.name] = str(reason)
            if rounding is not None:  # which a plain module would not do
                matrix = Plain(weight.dense().to(dtype))
    report.kernels[site.name] = "dense" if matrix is None else matrix.kernel
    if matrix is None:
        dense = (weight.dense() if dense is None else dense).to(dtype)
        put(model, stored.anatomy, site.parameter, dense.T if site.layout == "conv1d" else dense)
        return
    for name in (site.name, *site.aliases):
        old = model.get_submodule(name)
        new = (
            PackedEmbedding(matrix, dtype)
            if isinstance(old, nn.Embedding)
            else PackedLinear(matrix, getattr(old, "bias", None), dtype, rounding)
        )
        model.set_submodule(name, new)


def _check(model: nn.Module, site: Site, weight: Weight) -> None:
    for name in (site.name, *site.aliases):
        kind = type(model.get_submodule(name))
        if kind not in (nn.Linear, nn.Embedding, Conv1D):
            raise NoKernel(f"{kind.__name__} computes in a way of its own")
        if kind is nn.Embedding and weight.kind not in GRIDS:
            raise NoKernel(f"rows of a table are not looked up in {weight.kind}")


def kinds(folder: Path) -> set[str]:
    """The kinds of weight that config.json tells of; no weight is read."""
    raw = read_json(folder / "config.json")
    found = set(_named(raw.get("compressed_sites", {})))
    quantization = raw.get("quantization_config") or {}
    for group in quantization.get("config_groups", {}).values():
        found.add("quantized" if group["weights"]["type"] == "int" else "float8")
    if quantization.get("quant_method") in UNPACKED:
        found.add("quantized")
    if quantization.get("quant_method") == "bitsandbytes":
        found.add("int8" if quantization.get("load_in_8bit") else "nf4")
    return found


def _named(spec: Any) -> Iterator[str]:
    """Every ``kind`` in specs, however deep."""
    if isinstance(spec, dict):
        if isinstance(spec.get("kind"), str):
            yield spec["kind"]
        spec = list(spec.values())
    if isinstance(spec, list):
        for value in spec:
            yield from _named(value)


def _notes(model: nn.Module, grids: bool) -> list[str]:
    found = (m.note for m in model.modules() if isinstance(m, Matrix) and m.note)
    return [*(["computes in bfloat16"] if grids else []), *dict.fromkeys(found)]
