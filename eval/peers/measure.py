"""One job: calibration tokens in, a child process, and a row of numbers out."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress import registry
from compress.anatomy import Site, select
from compress.checkpoint import load_tokenizer, resolve
from compress.data import windows
from compress.errors import CompressError, RecipeError
from compress.source import Source
from eval.harness import evaluate
from eval.peers.environment import python
from eval.peers.jobs import OURS, TOOLKITS, Job, Method, Setting, Text
from eval.results import Result

CHILD = Path(__file__).with_name("child.py")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


@dataclass(frozen=True)
class Row:
    """What one job came to. ``error`` is the last line of a child that failed, and then all.

    samples   nll of every held-out window, nats a token
    bytes     of the weight files that the toolkit wrote
    matrices  bytes of the blocks' matrices in them, scales and zero-points included
    skipped   matrices of the blocks that the toolkit left as they were
    seconds   of the compression alone, and those that processors spent on it
    memory    bytes resident at its peak, above the imports'
    """

    job: Job
    samples: list[float] = field(default_factory=list)
    bytes: int = 0
    matrices: int = 0
    skipped: int = 0
    seconds: float = 0.0
    memory: int = 0
    cpu_seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    error: str = ""

    def line(self) -> str:
        return json.dumps(vars(self) | {"job": self.job.dump()})

    @staticmethod
    def of(line: str) -> Row:
        raw = json.loads(line)
        return Row(**raw | {"job": Job.of(raw["job"])})


def read(file: Path) -> list[Row]:
    """The rows of an earlier run, the last one of each job."""
    if not file.exists():
        return []
    rows = [Row.of(line) for line in file.read_text().splitlines()]
    return list({row.job.key: row for row in rows}.values())


def run(job: Job, home: Path) -> Row:
    """Compress in the toolkit's own environment, and measure what came of it.

    One that changed a matrix outside of the blocks did something else than the others, and failed.

    Raises:
        CompressError: the environment does not install.
    """
    toolkit = TOOLKITS[job.method.toolkit]
    interpreter = python(toolkit, home)
    source = Source(job.model)
    anatomy = source.anatomy
    blocks = select(anatomy.sites, ["blocks"], [], None, anatomy.layers)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "job.json").write_text(json.dumps(_wanted(job, out, toolkit.adapter, blocks)))
        done = subprocess.run(
            [interpreter, "-I", CHILD, out / "job.json"],
            capture_output=True, text=True, cwd=folder, env=_environment(job),
        )  # fmt: skip
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return Row(job, error=(lines or ["it was killed"])[-1][:300])
        answer = json.loads((out / "answer.json").read_text())
        touched = changed(source.files, out / "dense" / "model.safetensors")
        stray = sorted(touched - {f"{site.name}.weight" for site in blocks})
        if stray:
            return Row(job, error=f"it changed {stray[0]}, which is in no block")
        return Row(
            job,
            samples=nll(str(out / "dense"), job.text),
            bytes=sum(f.stat().st_size for kind in WEIGHTS for f in (out / "packed").rglob(kind)),
            matrices=answer["matrix_bytes"],
            skipped=len(blocks) - len(touched),
            seconds=answer["seconds"],
            cpu_seconds=answer["cpu_seconds"],
            memory=answer["resident_peak"] - answer["resident_imported"],
            versions=answer["versions"],
        )


def changed(before: Iterable[Path], after: Path) -> set[str]:
    """Names of the matrices that are neither as they were nor just what float16 makes of them.

    auto-round takes a model to float16 where a processor has no instructions for bfloat16. Vectors
    are left out: scales may be folded into norms.
    """
    new = load_file(after)
    old = {name: tensor for file in before for name, tensor in load_file(file).items()}
    return {k for k, t in old.items() if t.dim() > 1 and not _alike(t, new[k])}


def _alike(old: Tensor, new: Tensor) -> bool:
    return torch.equal(old, new) or torch.equal(old.half().to(old.dtype), new)


def nll(folder: str, text: Text) -> list[float]:
    """Mean nll of every held-out window, in nats a token."""
    for item in evaluate(
        [folder], ["nll"], data=text.data, samples=text.held_out, length=text.length
    ):
        if isinstance(item, Result):
            return item.samples
    raise CompressError(f"{folder}: nothing was measured")


def known(methods: Iterable[Method]) -> tuple[list[Method], list[str]]:
    """Methods that can be run, and the names of those of ours that are not there."""
    there, missing = [], []
    for method in methods:
        try:
            for stage in method.options.get("stages", []):
                registry.get(stage["use"])
            there.append(method)
        except RecipeError:
            missing.append(method.name)
    return there, missing


def _wanted(job: Job, out: Path, adapter: Path, sites: Sequence[Site]) -> dict[str, Any]:
    """What the child is told, beside files that it finds in ``out``."""
    model = resolve(job.model)
    tokens = windows(
        job.text.data,
        load_tokenizer(model),
        part="calibration",
        samples=job.text.samples,
        length=job.text.length,
        seed=job.seed,
    ).tokens
    save_file({"tokens": tokens}, out / "tokens.safetensors")
    options = dict(job.method.options)
    if job.method.toolkit == OURS:
        shapes = [site.shape for site in sites]
        options["stages"] = [s | _said(job.setting, s, shapes) for s in options["stages"]]
    return {
        "adapter": str(adapter),
        "out": str(out),
        "model": str(model),
        "modules": [site.name for site in sites],
        "tokens": str(out / "tokens.safetensors"),
        "method": job.method.method,
        "options": options,
        "symmetric": True,
        "seed": job.seed,
        "threads": job.threads,
        **vars(job.setting),
        **vars(job.text),
    }


def _said(
    setting: Setting, stage: dict[str, Any], shapes: Sequence[tuple[int, ...]]
) -> dict[str, Any]:
    """A setting in the words of a recipe, as far as this stage has them.

    Bits without groups are those of the file: as many as codes and 16-bit scales of matrices of
    these ``shapes`` [out, in] take elsewhere.
    """
    fields = registry.get(stage["use"]).model_fields
    words: dict[str, Any] = {"bits": setting.bits, "group": setting.group or "channel"}
    if setting.bits is None:
        share = {"sparsity": setting.sparsity}
        words = {"pattern": setting.pattern} if setting.pattern else share
    elif "group" not in fields:
        scales = sum(rows * math.ceil(width / (setting.group or width)) for rows, width in shapes)
        words["bits"] = setting.bits + 16 * scales / sum(map(math.prod, shapes))
    return {k: v for k, v in words.items() if k in fields}


def _environment(job: Job) -> dict[str, str]:
    """Threads wait as those of our command line do: for all toolkits alike."""
    threads = str(job.threads)
    return {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "1000",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
