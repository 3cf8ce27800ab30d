"""A model folder written in another format, and run there to see that nothing was lost."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, float32

from compress import registry
from compress.checkpoint import load
from compress.errors import CheckpointError, RecipeError, did_you_mean
from compress.export import vllm
from compress.export.base import Exporter, Held, probe, run
from compress.preflight import check_output
from compress.stored import Stored
from compress.verify import TOLERANCE, TOLERANCE_INT8, relative_difference
from compress.workdir import disk_errors, locked, place, work_folder

KINDS = ("dense", "sparse", "quantized", "coded", "lowrank", "sum", "float8", "int8", "nf4")
# Logits of weights that were rounded again may differ a good deal; those of a wrong layout by √2.
TOLERANCE_AGAIN = 0.9


def export(
    folder: str | Path,
    to: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Write the model in ``folder`` (ours, any Hugging Face folder, or demo) in the format ``to``.

    ``options`` are the exporter's fields. The output is written aside; before it appears at
    ``out``, its logits on a fixed probe are compared with those of ``load(folder)``, which takes
    the memory of both and which ``verify`` False leaves out. Returns a record: bytes, how many
    sites are held how, whether what they read is rounded, whether vLLM reads the folder, and the
    relative difference of the logits.

    Raises:
        RecipeError: no such format or option. ModelError: the folder cannot be read.
        CheckpointError: the format cannot hold this model, its package is missing, ``out`` cannot
            be written, or the logits are not those of the model; nothing is left at ``out`` then.
    """
    exporter, out = make(to, options), Path(out)
    if exporter.suffix and out.suffix != exporter.suffix:
        raise RecipeError(f"--out {out}: {to} is one file, whose name ends in {exporter.suffix}")
    check_output(out, overwrite=overwrite, file=bool(exporter.suffix))
    stored = Stored(folder)
    reason = refusal(exporter, stored)
    if reason:
        raise CheckpointError(f"{folder}: {to} cannot hold it: {reason}")
    work = work_folder(out)
    with disk_errors(out), locked(work):
        try:
            draft = work / out.name
            notes = exporter.write(stored, draft)
            held = _held(exporter, stored) | notes.pop("held", {})
            record = {
                "from": str(folder),
                "to": to,
                "out": str(out),
                "bytes": sum(f.stat().st_size for f in [draft, *draft.rglob("*")] if f.is_file()),
                "held": dict(Counter(held.values())),
                "inputs": _inputs(exporter, stored),
                "rounded_again": [name for name, how in held.items() if how == "rounded again"],
                **notes,
            }
            if any(draft.glob("*.safetensors")):
                record["vllm"] = vllm.said(Stored(draft))
            if verify:
                record |= _check(exporter, stored, draft, bool(record["rounded_again"]))
            place(draft, out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return record


def make(to: str, options: dict[str, Any]) -> Exporter:
    """The exporter called ``to`` with its options.

    Raises:
        RecipeError: no such format, option, or value.
    """
    cls = registry.find(to, registry.EXPORTERS, Exporter)  # type: ignore[type-abstract]
    for key in options:
        if key not in cls.model_fields:
            hint = did_you_mean(key, cls.model_fields) or "; it has none"
            raise RecipeError(f"{to} has no option '{key}'{hint}")
    try:
        return cls.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"{to}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def refusal(exporter: Exporter, stored: Stored) -> str | None:
    """Why a format cannot hold a model; None when it can."""
    for name, spec in stored.specs.items():
        if spec["kind"] not in exporter.holds:
            return f"{name} is a {spec['kind']} weight; it holds {', '.join(exporter.holds)}"
    return exporter.refusal(stored)


def how(exporter: type[Exporter] | Exporter, kind: str) -> Held | None:
    """How a format holds a kind of weight; None if it does not."""
    said = exporter.holds.get(kind)
    return said.partition(":")[0] if said else None  # type: ignore[return-value]


def _held(exporter: Exporter, stored: Stored) -> dict[str, Held | None]:
    return {name: how(exporter, spec["kind"]) for name, spec in stored.specs.items()}


def _inputs(exporter: Exporter, stored: Stored) -> str:
    """What becomes of the rounding of what matrices read, which the folder asks for."""
    asked = [name for name, spec in stored.specs.items() if "activations" in spec]
    if not asked:
        return "as they are"
    left = f"not rounded to 8 bits token by token, as {len(asked)} matrices of the folder ask for"
    return "rounded to 8 bits" if exporter.rounds_inputs else left


def _check(exporter: Exporter, stored: Stored, draft: Path, again: bool) -> dict[str, Any]:
    """Compare the logits of the draft with those of the folder."""
    model = load(stored.folder, dtype=float32)
    tokens = probe(model)
    expected = run(model, tokens)
    del model
    kinds = {spec["kind"] for spec in stored.specs.values()}
    rounds = any("activations" in spec for spec in stored.specs.values())
    allowed = TOLERANCE["bfloat16" if rounds else str(stored.config.dtype).rpartition(".")[2]]
    if "int8" in kinds or (rounds and not exporter.rounds_inputs):
        allowed = max(allowed, TOLERANCE_INT8)
    if again:
        allowed = TOLERANCE_AGAIN
    difference = _compared(exporter.logits(draft, tokens), expected, allowed, exporter.needs)
    others = {
        name: _compared(found, expected, max(allowed, TOLERANCE_INT8), name)
        for name, found in exporter.other_logits(draft, tokens).items()
    }
    found: dict[str, Any] = {"difference": difference, "tolerance": allowed}
    return found | ({"differences": others} if others else {})


def _compared(found: Tensor, expected: Tensor, allowed: float, where: str) -> float:
    """‖found − expected‖ / ‖expected‖.

    Raises:
        CheckpointError: it is more than ``allowed``.
    """
    difference = relative_difference(found.flatten(), expected.flatten())
    if not difference <= allowed:
        raise CheckpointError(
            f"the exported model's logits, by {where}, differ from the folder's by "
            f"{difference:.2g} (relative), more than {allowed}"
        )
    return difference
