"""A compressed folder, read back: every weight in the form in which it is stored.

Exporters and runtimes start here: a ``Quantized`` has its codes and scales, a ``LowRank`` its
factors. Folders of ours in every format are read, and those of other toolkits in the layouts of
compressed-tensors, bitsandbytes, GPTQ and AWQ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from compress.anatomy import Anatomy, Block, Site
from compress.assemble import assemble
from compress.errors import ModelError
from compress.formats import plain_classes
from compress.source import Original, Source, model_class, open_file, read_config, read_json
from compress.weights import (
    NF4,
    Dense,
    Float8,
    Huffman,
    Int8,
    LowRank,
    Masked,
    Quantized,
    Sum,
    Weight,
    layouts,
)
from compress.weights.base import spec_of

UNPACKED = ("gptq", "awq")  # quant_methods that ``load`` reads by way of this module
READ = ("compressed-tensors", "bitsandbytes", *UNPACKED)  # those whose layout is known here


class Stored(Source):
    """A model folder, compressed or not, as its sites' weights and its other tensors.

    ``config`` and ``model_class`` are the plain architecture's. Nothing but what is asked for is
    read.

    Raises:
        ModelError: not a model folder, or weights in a layout that is not known here.
    """

    def _described(self) -> tuple[PretrainedConfig, type[Any]]:
        raw = read_json(self.folder / "config.json")
        self.quantization: dict[str, Any] = raw.get("quantization_config") or {}
        method = self.quantization.get("quant_method")
        if method and method not in READ:
            raise ModelError(
                f"{self.folder}: its weights are in the layout of {method}, which is not read "
                f"matrix by matrix; {' and '.join(READ)} are"
            )
        if "compressed_sites" not in raw:
            config = read_config(self.folder)
            return config, model_class(config, self.folder)
        cls, config_class = plain_classes(raw)
        return config_class.from_dict(_plainly_named(raw)), cls

    def plain_config(self) -> dict[str, Any]:
        """config.json as it was before compression, but for the changes of shape."""
        raw = read_json(self.folder / "config.json")
        if "compressed_sites" in raw:
            raw = _plainly_named(raw)
        gone = ("quantization_config", "compressed_sites", "auto_map")
        return {key: value for key, value in raw.items() if key not in gone}

    @cached_property
    def specs(self) -> dict[str, dict[str, Any]]:
        """How each site's weight is stored, by the site's name; reads all of them once."""
        return {site.name: self.weight(site).spec for site in self.anatomy.sites}

    def _check_buffer(self, name: str) -> None:
        """What has no tensor of its name is a site that is stored otherwise, or a buffer."""
        if not any(key.startswith(name.removesuffix("weight")) for key in self.there):
            super()._check_buffer(name)

    def _stored_dtypes(self) -> Anatomy:
        return self.anatomy  # those of the config: packed tensors have others

    def weight(self, site: Site) -> Weight:
        """One site's weight.

        Raises:
            ModelError: it is in a layout that is not known here.
        """
        base = self._base_weight(site)
        update = self._updates.get(site.name)
        return base if update is None else Sum.of(base, update)

    def others(self) -> dict[str, Tensor]:
        """All tensors that no site stands for: norms, biases, positions, buffers."""
        inside = {site.parameter for site in self.anatomy.sites}
        names = (name for block in self.anatomy.blocks for name in block.tensors)
        return {name: self.tensor(name) for name in names if name not in inside}

    def block(self, block: Block) -> tuple[dict[str, Weight], dict[str, Tensor]]:
        """As the dense model has it: every weight expanded, in its dtype."""
        weights: dict[str, Weight] = {}
        for site in block.sites:
            weight = self.weight(site)
            weights[site.name] = Dense.of(weight.dense().to(weight.dtype))
        inside = {site.parameter for site in block.sites}
        return weights, {n: self.tensor(n) for n in block.tensors if n not in inside}

    def set_generation(self, model: Any) -> None:
        """Give ``model`` the folder's settings for ``generate``, where it has any."""
        if model.can_generate() and (self.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)

    def _base_weight(self, site: Site) -> Weight:
        sites = getattr(self.config, "compressed_sites", {})
        if site.name in sites:
            known = sites[site.name]
            weight = Weight.restore(known["spec"], self._parts(site, known["tensors"]))
            return weight.plain() if isinstance(weight, (Huffman, Masked)) else weight
        parts = self._parts(site)
        if self.quantization.get("quant_method") == "compressed-tensors":
            return self._compressed_tensors(site, parts)
        if "qweight" in parts:
            return self._by_inputs(site, parts)
        if "SCB" in parts:
            codes = {"codes": parts["weight"], "SCB": parts["SCB"]}
            return Int8(self._spec("int8", site), codes)
        if "weight.absmax" in parts:
            return self._nf4(site, parts)
        return self._plain(site)

    def _plain(self, site: Site) -> Weight:
        if site.parameter not in self._place:
            raise ModelError(f"{self.folder}: the checkpoint has no tensor for {site.parameter}")
        matrix = self.tensor(site.parameter)
        return Dense.of(matrix.T if site.layout == "conv1d" else matrix)

    def _parts(self, site: Site, names: Collection[str] = ()) -> dict[str, Tensor]:
        """The tensors of a site (of these ``names``), by what comes after its name."""
        start = f"{site.name}."
        return {
            name.removeprefix(start): open_file(file).get_tensor(key)
            for name, (file, key) in self.there.items()
            if name.startswith(start) and (not names or name.removeprefix(start) in names)
        }

    def _spec(self, kind: str, site: Site, **numbers: Any) -> dict[str, Any]:
        return spec_of(kind, torch.empty(site.shape, device="meta"), self._dtype, **numbers)

    @cached_property
    def _dtype(self) -> torch.dtype:
        dtype = self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def _compressed_tensors(self, site: Site, parts: dict[str, Tensor]) -> Weight:
        scale = parts.get("weight_scale")
        if scale is None:
            return self._plain(site)
        if "weight_g_idx" in parts:
            raise ModelError(f"{self.folder}: {site.name} has its columns in another order (g_idx)")
        scheme = self._scheme(site)
        numbers, inputs = scheme["weights"], scheme.get("input_activations")
        scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
        if numbers.get("strategy") not in ("group", "channel") or len(scale) != site.shape[0]:
            raise ModelError(
                f"{self.folder}: {site.name} has scales by {numbers.get('strategy')}; rows and "
                "groups in rows are read"
            )
        weight = self._on_grid(site, parts, scale, numbers)
        if inputs:
            rounding = "float8" if numbers["type"] == "float" else inputs["num_bits"]
            weight.spec["activations"] = rounding
        return weight

    def _on_grid(
        self, site: Site, parts: dict[str, Tensor], scale: Tensor, numbers: dict[str, Any]
    ) -> Weight:
        if numbers["type"] == "float":
            codes = parts["weight"].view(torch.uint8)
            return Float8(self._spec("float8", site), {"codes": codes, "weight_scale": scale})
        bits, group = numbers["num_bits"], site.shape[1]
        if numbers["strategy"] == "group":
            group = min(numbers["group_size"], group)
        zero = parts.get("weight_zero_point")
        if "weight_packed" in parts:
            kept = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
            spec = self._spec("quantized", site, bits=bits, group=group, symmetric=zero is None)
            return Quantized(spec, {key: parts[key] for key in kept if key in parts})
        half = 1 << (bits - 1)
        return Quantized.pack(
            parts["weight"].int() + half,
            scale,
            None if zero is None else zero.reshape(scale.shape).int() + half,
            bits=bits,
            group=group,
            dtype=self._dtype,
        )

    def _by_inputs(self, site: Site, parts: dict[str, Tensor]) -> Weight:
        """Of the layouts of GPTQ and AWQ."""
        said = self.quantization
        if said["quant_method"] == "awq":
            if said.get("version", "gemm") != "gemm" or said.get("bits", 4) != 4:
                raise ModelError(f"{self.folder}: AWQ is read in 4 bits and its gemm version only")
            return layouts.from_awq(parts, said.get("group_size", 128), self._dtype)
        numbers = said | next(
            (
                changes
                for pattern, changes in (said.get("dynamic") or {}).items()
                if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), site.name)
            ),
            {},
        )
        version = 2 if said.get("checkpoint_format") == "gptq_v2" else 1
        return layouts.from_gptq(
            parts, numbers["bits"], numbers["group_size"], version, self._dtype
        )

    def _scheme(self, site: Site) -> dict[str, Any]:
        """The config group of compressed-tensors that a site belongs to; its own name first."""
        cls = {"linear": "Linear", "embedding": "Embedding"}.get(site.layout)
        by_name: tuple[str, ...] = (site.name, *site.aliases)
        for wanted in (by_name, (cls,)):
            for group in self.quantization["config_groups"].values():
                for target in group["targets"]:
                    expression = target.removeprefix("re:")
                    if target in wanted or (
                        target != expression and re.match(expression, site.name)
                    ):
                        return group
        raise ModelError(f"{self.folder}: quantization_config names no group for {site.name}")

    def _nf4(self, site: Site, parts: dict[str, Tensor]) -> Weight:
        tensors = {"codes": parts["weight"]}
        for key, tensor in parts.items():
            if key.startswith("weight."):
                name = key.removeprefix("weight.")
                kind = name.partition(".")[2]
                if kind.startswith("bitsandbytes__") and kind != "bitsandbytes__nf4":
                    raise ModelError(f"{self.folder}: {site.name} is {kind}; nf4 is read")
                tensors["quant_state" if kind else name] = tensor
        state = json.loads(bytes(tensors["quant_state"].tolist()).decode())
        spec = self._spec(
            "nf4", site, block=state["blocksize"], double_quant="nested_absmax" in tensors
        )
        return NF4(spec, tensors)

    @cached_property
    def _updates(self) -> dict[str, LowRank]:
        """The low-rank weights of a PEFT adapter in the folder, by site."""
        config = read_json(self.folder / "adapter_config.json")
        file = self.folder / "adapter_model.safetensors"
        if not config or not file.is_file():
            return {}
        tensors = open_file(file)
        found = {}
        for site in self.anatomy.sites:
            start = f"base_model.model.{site.name}.lora_"
            if f"{start}A.weight" in tensors.keys():  # noqa: SIM118 - not a dict
                rank = config["rank_pattern"].get(site.name, config["r"])
                alpha = config["alpha_pattern"].get(site.name, config["lora_alpha"])
                A, B = (tensors.get_tensor(f"{start}{x}.weight") for x in "AB")
                scaled = B.float() * (alpha / rank)
                found[site.name] = LowRank.of(scaled, A.float(), self._dtype)
        return found


def unpacked(folder: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The dense model of a folder in a layout of ``UNPACKED``; needs no package to read them."""
    stored = Stored(folder)
    model: Any = assemble(stored, Original(stored), dtype or stored._dtype)
    stored.set_generation(model)
    return model


def _plainly_named(raw: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the names of the architecture that our modelling file builds on."""
    cls, config_class = plain_classes(raw)
    return raw | {"model_type": config_class.model_type, "architectures": [cls.__name__]}
