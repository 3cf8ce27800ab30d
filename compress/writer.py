"""Folders out: a compressed model as a Hugging Face checkpoint.

config.json, safetensors and tokenizer first. Beside them lie ``recipe.yaml`` (every default filled
in), ``compression.json`` (what was done to each weight, and the logits to expect) and
``README.md``, the model card. Everything is written to a temporary folder, synced, and renamed, so
a folder of this name is always whole; equal inputs give equal bytes, which is why no date and no
duration is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer

from compress.checkpoint import RECORD
from compress.formats import Shapes, choose, shapes_of
from compress.recipe import Recipe
from compress.source import COMPANIONS, INDEX, Source
from compress.store import Blocks, SafetensorsWriter, save_tensors
from compress.weights import Sum, Weight

SHARD = 4 << 30  # bytes of tensors a file holds at most


class Writer:
    """Writes the checkpoint of a finished run into ``draft``, block by block."""

    def __init__(self, source: Source, store: Blocks, recipe: Recipe, draft: Path) -> None:
        self.source, self.store, self.recipe, self.draft = source, store, recipe, draft
        self.specs: dict[str, dict[str, Any]] = {}
        self.records: list[dict[str, Any]] = []
        for number in range(len(source.anatomy.blocks)):
            specs, records = store.header(number)
            self.specs |= specs
            self.records += records
        self.format = choose(
            source.anatomy, self.specs, source.model_class, source.config, recipe.storage
        )

    def write(
        self, name: str, expected: dict[str, Any], reports: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Write all files of the folder; returns the record.

        ``expected`` is what verify checks, ``reports`` what each stage says of its training.
        """
        shutil.rmtree(self.draft, ignore_errors=True)
        self.draft.mkdir(parents=True)
        shapes, ideal, loaded = self._write_tensors()
        self._write_config(shapes)
        copy_companions(self.source.folder, self.draft)
        self.format.write_files(self.draft)
        original = self.source.original
        disk = sum(f.stat().st_size for f in self.draft.glob("*.safetensors"))
        info = {
            "format": 1,
            "name": name,
            "base": {
                "model": self._base(),
                "hash": original.hash,
                "bytes": original.nbytes,
                "parameters": original.parameters,
            },
            "parameters": self.source.parameters,
            "storage": self.format.name,
            "loads_with": self.format.needs + (", and peft" if self._adapter() else ""),
            "bytes": {
                "disk": disk,
                "original": original.nbytes,
                "ideal": ideal,
                "loaded": loaded,
            },
            "seed": self.recipe.seed,
            "recipe": self.recipe.dump(),
            "summary": self.recipe.summary(),
            "families": {s.use: s.compressor.family for s in self.recipe.stages},
            "stages": [
                {"use": s.use} | r for s, r in zip(self.recipe.stages, reports, strict=True)
            ],
            "sites": self.records,
            "expected": expected,
            "files": {f.name: sha256(f) for f in sorted(self.draft.glob("*.safetensors"))},
            "versions": versions(),
        }
        (self.draft / "recipe.yaml").write_text(self.recipe.to_yaml())
        (self.draft / RECORD).write_text(json.dumps(info, indent=1) + "\n")
        (self.draft / "README.md").write_text(model_card(info))
        return info

    def _base(self) -> str:
        """The original as another process finds it again: demo, a hub id, or an absolute path."""
        name = self.source.name
        return str(Path(name).resolve()) if Path(name).is_dir() else name

    def _adapter(self) -> bool:
        sums = any(spec["kind"] == "sum" for spec in self.specs.values())
        return sums and not self.format.holds_sums

    def _write_tensors(self) -> tuple[Shapes, int, int]:
        """Stream the blocks into shards; also (ideal bytes, bytes when loaded dense)."""
        shards = Shards(self.draft)
        adapter = Adapter(self.draft)
        shapes: Shapes = {}
        ideal = loaded = 0
        for number, block in enumerate(self.source.anatomy.blocks):
            part = self.store.read(number)
            for name, tensor in part.others.items():
                shards.add(name, tensor)
                ideal += _size(tensor)
                loaded += _size(tensor)
            for site in block.sites:
                weight = part.weights[site.name]
                ideal += weight.nbytes
                loaded += site.nbytes
                if isinstance(weight, Sum) and not self.format.holds_sums:
                    weight, *rest = weight.terms
                    adapter.add(site.name, rest, site.layout)
                shapes[site.name] = shapes_of(weight)
                for name, tensor in self.format.tensors(site, weight).items():
                    shards.add(name, tensor)
        shards.close()
        adapter.close(self._base())
        return shapes, ideal, loaded

    def _write_config(self, shapes: Shapes) -> None:
        config = json.loads((self.source.folder / "config.json").read_text())
        config.setdefault("architectures", [self.source.model_class.__name__])
        config |= self.source.changes
        if self.recipe.untie:
            config["tie_word_embeddings"] = False
        if not {"dtype", "torch_dtype"} & set(config):
            config["dtype"] = str(self.source.dtype).split(".")[1]
        self.format.configure(config, shapes)
        (self.draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class Shards:
    """Weight files of bounded size: one file, or several and their index."""

    def __init__(self, folder: Path, limit: int = SHARD) -> None:
        self.folder, self.limit = folder, limit
        self.writers: list[SafetensorsWriter] = []
        self.map: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        if not self.writers or (
            self.writers[-1].nbytes and self.writers[-1].nbytes + _size(tensor) > self.limit
        ):
            if self.writers:
                self.writers[-1].close()
            path = self.folder / f"shard-{len(self.writers)}"
            self.writers.append(SafetensorsWriter(path))
        self.writers[-1].add(name, tensor)
        self.map[name] = len(self.writers) - 1

    def close(self) -> None:
        self.writers[-1].close()
        count = len(self.writers)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        for writer, name in zip(self.writers, names, strict=True):
            writer.path.replace(self.folder / name)
        if count > 1:
            index = {
                "metadata": {"total_size": sum(w.nbytes for w in self.writers)},
                "weight_map": {name: names[shard] for name, shard in sorted(self.map.items())},
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


class Adapter:
    """A PEFT LoRA adapter in the checkpoint's own folder; transformers loads it with the model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self.ranks: dict[str, int] = {}
        self.transposed = False

    def add(self, name: str, terms: list[Weight], layout: str) -> None:
        """Add the low-rank terms of one site, side by side as one."""
        added = adapter_tensors(name, terms)
        self.tensors |= added
        self.ranks[name] = len(next(iter(added.values())))
        self.transposed |= layout == "conv1d"

    def close(self, base: str) -> None:
        if not self.tensors:
            return
        save_tensors(self.folder / "adapter_model.safetensors", self.tensors)
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": max(self.ranks.values()),
            "lora_alpha": max(self.ranks.values()),
            "rank_pattern": self.ranks,
            "alpha_pattern": self.ranks,
            "bias": "none",
            "target_modules": sorted(self.ranks),
            "lora_dropout": 0.0,
            "fan_in_fan_out": self.transposed,
            "task_type": None,
        }
        (self.folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def adapter_tensors(name: str, terms: list[Weight]) -> dict[str, Tensor]:
    """A [rank, in] and B [out, rank] of one site's low-rank terms side by side, by PEFT's names."""
    B = torch.cat([term.left.dense() for term in terms], dim=1)  # type: ignore[attr-defined]
    A = torch.cat([term.right.dense() for term in terms], dim=0)  # type: ignore[attr-defined]
    start, dtype = f"base_model.model.{name}.lora", terms[0].dtype
    return {f"{start}_A.weight": A.to(dtype), f"{start}_B.weight": B.to(dtype)}


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config and the like; name the tokenizer's class if nobody did."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    path = target / "tokenizer_config.json"
    if path.exists() and "tokenizer_class" not in (config := json.loads(path.read_text())):
        config["tokenizer_class"] = type(AutoTokenizer.from_pretrained(source)).__name__
        path.write_text(json.dumps(config, indent=2) + "\n")


def publish(draft: Path, out: Path) -> None:
    """Make ``draft`` appear as ``out``, whole: sync every file, then rename."""
    for path in [draft, *sorted(draft.rglob("*"))]:
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    draft.rename(out)


def model_card(info: dict[str, Any]) -> str:
    """The folder's README.md, with Hugging Face card metadata; `compress report` adds results."""
    base, sizes = info["base"], info["bytes"]
    stages = info["summary"] or "no compression"
    remote = ", trust_remote_code=True" if info["storage"] == "modelling file" else ""
    auto = info["expected"]["auto_class"]
    prompts = " AutoTokenizer asks unless it is told so, too." if remote else ""
    link = f"base_model: {base['model']}\n" if not base["model"].startswith(("/", "demo")) else ""
    kind = "base_model_relation: quantized\n" if link and _quantizes(info) else ""
    lines = [
        f"---\nlibrary_name: transformers\n{link}{kind}tags:\n- compresskit\n- compressed\n---\n",
        f"# {info['name']}\n",
        f"`{Path(base['model']).name}` compressed by {stages}: {sizes['disk']:,} bytes of weights "
        f"where the original has {sizes['original']:,} "
        f"({sizes['disk'] / sizes['original']:.1%}).\n",
        "## Load\n",
        f"Needs {info['loads_with']}.{prompts}\n",
        f"```python\nfrom transformers import {auto}\n"
        f"model = {auto}.from_pretrained('this/folder'{remote})\n```\n",
        "## How it was made\n",
        "`recipe.yaml` in this folder, every default filled in, is below; `compression.json` says "
        "what became of each weight. Again, with the same bytes as the result:\n",
        f"```bash\ncompress apply recipe.yaml --model {base['model']} --out again\n```\n",
        f"Original: `{base['model']}`, {base['parameters']:,} parameters, hash `{base['hash']}`. "
        + ", ".join(f"{k} {v}" for k, v in info["versions"].items())
        + ".\n",
        f"```yaml\n{yaml.safe_dump(info['recipe'], sort_keys=False, width=100)}```",
    ]
    return "\n".join(lines) + "\n"


def _quantizes(info: dict[str, Any]) -> bool:
    return "quantization" in info["families"].values()


def versions() -> dict[str, str]:
    """Versions that decide what the bytes are."""
    names = ("compresskit", "torch", "transformers", "bitsandbytes", "compressed-tensors", "peft")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
