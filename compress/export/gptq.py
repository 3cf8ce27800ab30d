"""``gptq``: packed integers in the layout that most kernels for weights of few bits read."""

from __future__ import annotations

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.anatomy import Site
from compress.export.base import Exporter, Held, run
from compress.export.writing import uneven, write_folder
from compress.formats import Format, Shapes
from compress.stored import Stored
from compress.weights import Quantized, Weight
from compress.weights.layouts import WORD, stored_bits, to_gptq, widened


class GPTQExporter(Exporter):
    """A folder with ``quant_method: gptq``, as gptqmodel, vLLM and SGLang run it packed.

    Grids of 5, 6 and 7 bits take the 8 bits of the next layout. Embeddings, heads, and what is not
    packed are plain tensors.
    """

    needs: ClassVar[str] = (
        "transformers with gptqmodel, compress.load, or vLLM (4 and 8 bits without zero-points)"
    )
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
        how = GPTQFormat(stored.anatomy, stored.specs, stored.model_class, stored.config)
        held: dict[str, Held] = {}

        def weight(site: Site) -> Weight:
            found = stored.weight(site)
            if isinstance(found, Quantized):
                held[site.name] = "expanded"
                if fits(site, found.spec):
                    scale = found.tensors["weight_scale"].float()
                    exact = torch.equal(scale.half().float(), scale)
                    held[site.name] = "exactly" if exact else "nearly"
            return found

        write_folder(stored, out, how, weight)
        return {"held": held}

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
    return whole and columns % spec["group"] == 0


class GPTQFormat(Format):
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx`` where they fit, plain tensors elsewhere."""

    name = "gptq"
    needs = GPTQExporter.needs

    def refusal(self) -> str | None:
        return None

    def tensors(self, site: Site, weight: Weight) -> dict[str, Tensor]:
        if not isinstance(weight, Quantized) or not fits(site, weight.spec):
            return super().tensors(site, weight)
        return {f"{site.name}.{key}": t for key, t in to_gptq(widened(weight)).items()}

    def configure(self, config: dict[str, Any], shapes: Shapes) -> None:
        """``quantization_config``: what most matrices have, by name what others have instead."""
        packed = {s.name: self.specs[s.name] for s in self.sites if fits(s, self.specs[s.name])}
        settings = {n: (stored_bits(spec["bits"]), spec["group"]) for n, spec in packed.items()}
        (bits, group), _ = Counter(settings.values()).most_common(1)[0]
        symmetric = all(spec["symmetric"] for spec in packed.values())
        changes: dict[str, dict[str, int]] = {}
        for site in self.sites:
            exactly = f"^{re.escape(site.name)}$"
            if site.name not in settings:
                if site.layout != "embedding" and site.block is not None:
                    changes[f"-:{exactly}"] = {}
            elif settings[site.name] != (bits, group):
                own_bits, own_group = settings[site.name]
                changes[f"+:{exactly}"] = {"bits": own_bits, "group_size": own_group}
        config["quantization_config"] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq" if symmetric else "gptq_v2",
            "bits": bits,
            "group_size": group,
            "sym": symmetric,
            "desc_act": False,
            "lm_head": False,
            **({"dynamic": changes} if changes else {}),
        }
