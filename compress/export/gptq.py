"""``gptq``: packed integers in the layout that most kernels for weights of few bits read."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.anatomy import Site
from compress.checkpoint import load
from compress.export.base import Exporter, Held, run
from compress.export.dense import keep_record, uneven
from compress.stored import Stored
from compress.weights import Quantized, Weight
from compress.weights.layouts import WORD, to_gptq, widened
from compress.writer import Shards, copy_companions


class GPTQExporter(Exporter):
    """A folder with ``quant_method: gptq``, as gptqmodel, vLLM and SGLang run it packed.

    Grids of 5, 6 and 7 bits take the 8 bits of the next layout. Embeddings, heads, and what is not
    packed are plain tensors.
    """

    needs: ClassVar[str] = "transformers with gptqmodel, vLLM, or compress.load"
    holds: ClassVar[dict[str, str]] = {
        "dense": "exactly",
        "sparse": "expanded: zeros are stored",
        "quantized": "exactly: where both sides are multiples of 32; else expanded",
        "coded": "expanded",
        "lowrank": "expanded: factors are multiplied",
        "sum": "expanded: terms are added",
        "float8": "expanded",
        "int8": "expanded",
        "nf4": "expanded",
    }

    def refusal(self, stored: Stored) -> str | None:
        if not any(fits(site, stored.specs[site.name]) for site in stored.anatomy.sites):
            return "no matrix of its blocks is packed in groups that fill words of 32 bits"
        return uneven(stored)

    def write(self, stored: Stored, out: Path) -> dict[str, Any]:
        out.mkdir()
        shards = Shards(out)
        held: dict[str, Held] = {}
        settings: dict[str, tuple[int, int, bool]] = {}
        for block in stored.anatomy.blocks:
            dense, others = stored.block(block)
            for site in block.sites:
                weight = stored.weight(site)
                if not fits(site, weight.spec):
                    matrix = dense[site.name].dense().to(weight.dtype)
                    shards.add(site.parameter, matrix.T if site.layout == "conv1d" else matrix)
                    if weight.kind == "quantized":
                        held[site.name] = "expanded"
                    continue
                wide = widened(_packed(weight))
                spec = wide.spec
                settings[site.name] = (spec["bits"], spec["group"], spec["symmetric"])
                tensors = to_gptq(wide)
                scale = wide.tensors["weight_scale"]
                exact = torch.equal(tensors["scales"].T.float(), scale.float())
                held[site.name] = "exactly" if exact else "nearly"
                for key, tensor in tensors.items():
                    shards.add(f"{site.name}.{key}", tensor)
            for name, tensor in others.items():
                shards.add(name, tensor)
        shards.close()
        config = stored.plain_config()
        config["quantization_config"] = _described(stored, settings)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_companions(stored.folder, out)
        keep_record(stored.folder, out, "gptq", self.needs)
        return {"held": held}

    def logits(self, out: Path, tokens: Tensor) -> Tensor:
        return run(load(out, dtype=torch.float32), tokens)

    def other_logits(self, out: Path, tokens: Tensor) -> dict[str, Tensor]:
        if not find_spec("gptqmodel"):
            return {}
        from transformers import AutoModelForCausalLM

        return {"gptqmodel": run(AutoModelForCausalLM.from_pretrained(out), tokens)}


def fits(site: Site, spec: dict[str, Any]) -> bool:
    """Whether a weight of this spec has a place in the layout."""
    if spec["kind"] != "quantized" or site.layout == "embedding" or site.block is None:
        return False
    rows, columns = spec["shape"]
    whole = rows % WORD == 0 and columns % WORD == 0
    return whole and columns % spec["group"] == 0 and "activations" not in spec


def _packed(weight: Weight) -> Quantized:
    assert isinstance(weight, Quantized)
    return weight


def _described(stored: Stored, settings: dict[str, tuple[int, int, bool]]) -> dict[str, Any]:
    """``quantization_config``: what most matrices have, and by name what others have instead."""
    (bits, group, _), _ = Counter(settings.values()).most_common(1)[0]
    symmetric = all(even for _, _, even in settings.values())
    changes: dict[str, dict[str, int]] = {}
    for site in stored.anatomy.sites:
        exactly = f"^{re.escape(site.name)}$"
        if site.name not in settings:
            if site.layout != "embedding" and site.block is not None:
                changes[f"-:{exactly}"] = {}
        elif settings[site.name][:2] != (bits, group):
            own_bits, own_group, _ = settings[site.name]
            changes[f"+:{exactly}"] = {"bits": own_bits, "group_size": own_group}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        **({"dynamic": changes} if changes else {}),
    }
