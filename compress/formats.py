"""The ways a checkpoint folder can hold compressed weights, plainest first.

    dense               every weight a plain tensor: any transformers loads it
    compressed-tensors  packed integers: transformers with compressed-tensors, and vLLM
    bitsandbytes        int8 or nf4: transformers with bitsandbytes
    modelling file      anything: transformers with trust_remote_code=True, or compress.load

``choose`` takes the first that can hold every weight of a model as it is. What low-rank addition
a packed weight carries goes beside it as a PEFT adapter, which transformers finds by itself.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compress.anatomy import Anatomy, Site
from compress.weights import Weight, modeling_compressed

Spec = dict[str, Any]
Shapes = dict[str, dict[str, tuple[list[int], str]]]  # site → tensor → shape and dtype
CUSTOM = "compressed-"  # model_type of a folder with a modelling file: this and the original's
MODELLING = "modeling_compressed.py"


@dataclass(frozen=True)
class Format(ABC):
    """How the sites of one model are written. ``specs`` maps a site's name to its weight's spec."""

    anatomy: Anatomy
    specs: dict[str, Spec]
    model_class: type[Any]
    config: Any
    adapter: bool = False  # whether a PEFT adapter lies beside the weights

    name: ClassVar[str]
    needs: ClassVar[str]
    holds_sums: ClassVar[bool] = False

    @property
    def sites(self) -> list[Site]:
        return self.anatomy.sites

    def of_kind(self, *kinds: str) -> list[Site]:
        return [s for s in self.sites if self.specs[s.name]["kind"] in kinds]

    def kept_apart(self, site: Site) -> bool:
        """Whether transformers keeps this module out of quantizers (T5's wo): its code reads it."""
        fixed = getattr(self.model_class, "_keep_in_fp32_modules", None) or ()
        return bool(set(site.name.split(".")) & set(fixed))

    @abstractmethod
    def refusal(self) -> str | None:
        """Why this format cannot hold these weights; None when it can."""

    def tensors(self, site: Site, weight: Weight) -> dict[str, Tensor]:
        """Tensors of one site, by their full names in the checkpoint."""
        matrix = weight.dense().to(weight.dtype)
        return {site.parameter: matrix.T.contiguous() if site.layout == "conv1d" else matrix}

    def configure(self, config: dict[str, Any], shapes: Shapes) -> None:
        """Change config.json so that loaders know; ``shapes`` of each site's stored tensors."""
        return

    def write_files(self, folder: Path) -> None:
        """Write what else the folder needs."""
        return


class DenseFormat(Format):
    name = "dense"
    needs = "transformers"

    def refusal(self) -> str | None:
        kinds = {spec["kind"] for spec in self.specs.values()} - {"dense", "sparse"}
        return f"{', '.join(sorted(kinds))} weights are not plain tensors" if kinds else None


@dataclass(frozen=True)
class Scheme:
    """Sites with the same one make up a config group of compressed-tensors."""

    kind: str
    bits: int = 8
    group: int | None = None  # None: a whole row
    symmetric: bool = True
    inputs: int | str | None = None  # what round_tokens does to what a site reads

    @classmethod
    def of(cls, spec: Spec) -> Scheme:
        if spec["kind"] == "float8":
            return cls("float8", inputs=spec.get("activations"))
        group = None if spec["group"] == spec["shape"][1] else spec["group"]
        return cls("quantized", spec["bits"], group, spec["symmetric"], spec.get("activations"))

    def group_settings(self) -> dict[str, Any]:
        numbers = {
            "num_bits": self.bits,
            "type": "float" if self.kind == "float8" else "int",
            "symmetric": self.symmetric,
        }
        weights = numbers | {"dynamic": False, "strategy": "channel"}
        if self.group is not None:
            weights |= {"strategy": "group", "group_size": self.group}
        inputs = numbers | {"dynamic": True, "strategy": "token"}
        packed = "int-quantized" if self.inputs else "pack-quantized"
        return {
            "format": "float-quantized" if self.kind == "float8" else packed,
            "weights": weights,
            "input_activations": inputs if self.inputs else None,
            "output_activations": None,
        }


class CompressedTensors(Format):
    name = "compressed-tensors"
    needs = "transformers and compressed-tensors"

    def refusal(self) -> str | None:
        packed = self.of_kind("quantized", "float8")
        held = {"dense", "sparse", "quantized", "float8"}
        others = {s["kind"] for s in self.specs.values()} - held
        if others or not packed:
            return f"{', '.join(sorted(others)) or 'no'} weights among the packed ones"
        if any(site.layout == "conv1d" for site in packed):
            return "compressed-tensors passes over Conv1D modules"
        for site in self.of_kind("quantized"):
            spec = self.specs[site.name]
            if site.shape[1] % spec["group"]:
                return f"{site.name}: the group does not divide the width {site.shape[1]}"
            if spec["bits"] == 4 and not spec["symmetric"] and site.shape[0] <= 8:
                return f"{site.name}: compressed-tensors cannot unpack so few 4-bit zero-points"
        rounds = any("activations" in self.specs[site.name] for site in packed)
        if self._dequantize() and rounds:
            return "weights that are unpacked while loading read inputs that are not rounded"
        if self._dequantize() and len(self._schemes()) > 1:
            return "zero-points, packed embeddings and adapters load with one setting only"
        return None

    def _schemes(self) -> dict[Scheme, list[Site]]:
        schemes: dict[Scheme, list[Site]] = {}
        for site in self.of_kind("quantized", "float8"):
            scheme = Scheme.of(self.specs[site.name])
            schemes.setdefault(scheme, []).append(site)
        return schemes

    def _dequantize(self) -> bool:
        """Whether transformers must unpack while loading: what its lazy path cannot hold."""
        return (
            self.adapter
            or self._reads_outputs()
            or any(
                site.layout == "embedding"
                or not self.specs[site.name].get("symmetric", True)
                or self.kept_apart(site)
                for site in self.of_kind("quantized", "float8")
            )
        )

    def _reads_outputs(self) -> bool:
        """Whether the model is an encoder-decoder with a tensor of its own (Bart's logits bias).

        The lazy path hands such a module what it is called with anew, an encoder's outputs as a
        dict without their type, which the model does not take (compressed-tensors 0.20).
        """
        names = (name for block in self.anatomy.blocks for name in block.tensors)
        return bool(self.config.is_encoder_decoder) and any("." not in name for name in names)

    def tensors(self, site: Site, weight: Weight) -> dict[str, Tensor]:
        if weight.kind == "float8":
            codes = weight.tensors["codes"].view(torch.float8_e4m3fn)
            scale = weight.tensors["weight_scale"]
            return {site.parameter: codes, f"{site.name}.weight_scale": scale}
        if weight.kind != "quantized":
            return super().tensors(site, weight)
        if "activations" in weight.spec:  # a byte a code, ready for integer kernels
            codes = modeling_compressed.unpack_codes(weight.spec, weight.tensors)
            scale = weight.tensors["weight_scale"]
            return {site.parameter: codes, f"{site.name}.weight_scale": scale}
        return {f"{site.name}.{key}": tensor for key, tensor in weight.tensors.items()}

    def configure(self, config: dict[str, Any], shapes: Shapes) -> None:
        packed = {site.name for site in self.of_kind("quantized", "float8")}
        plain = [
            name
            for site in self.sites
            if site.layout == "linear" or site.aliases
            for name in (site.name, *site.aliases)
            if site.name not in packed
        ]
        groups = {}
        for number, (scheme, sites) in enumerate(self._schemes().items()):
            one = len(self._schemes()) == 1 and all(s.layout == "linear" for s in sites)
            targets = ["Linear"] if one else [site.name for site in sites]
            groups[f"group_{number}"] = {"targets": targets, **scheme.group_settings()}
        formats = {group["format"] for group in groups.values()}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": plain,
        }
        if self._dequantize():
            config["quantization_config"]["dequantize"] = True


class BitsAndBytes(Format):
    name = "bitsandbytes"
    needs = "transformers and bitsandbytes"

    def refusal(self) -> str | None:
        others = {s["kind"] for s in self.specs.values()} - {"dense", "sparse"}
        if others not in ({"int8"}, {"nf4"}):
            return f"{', '.join(sorted(others)) or 'no packed'} weights are not one of int8 and nf4"
        apart = [s.name for s in self.of_kind("int8", "nf4") if self.kept_apart(s)]
        if apart:
            return f"transformers keeps {apart[0]} out of bitsandbytes' hands"
        odd = [s.name for s in self.of_kind("nf4") if s.shape[0] % 32]
        if odd:
            return f"bitsandbytes' kernel for CPUs takes 32 rows at a time, not {odd[0]}'s"
        settings = {
            (self.specs[s.name].get("block"), self.specs[s.name].get("double_quant"))
            for s in self.of_kind("nf4")
        }
        if len(settings) > 1:
            return "bitsandbytes has one nf4 setting for a whole model"
        for site in self.of_kind("nf4"):  # its AVX-512 code starts every row with a new block
            if site.shape[1] % self.specs[site.name]["block"]:
                return f"{site.name}: blocks that cross rows are read wrongly on some CPUs"
        return None

    def tensors(self, site: Site, weight: Weight) -> dict[str, Tensor]:
        base = site.parameter
        if weight.kind == "int8":
            codes, scale = weight.tensors["codes"], weight.tensors["SCB"]
            return {
                base: codes,
                f"{site.name}.SCB": scale,
                f"{site.name}.weight_format": torch.tensor(0, dtype=torch.uint8),
            }
        if weight.kind == "nf4":
            named = {f"{base}.{key}": tensor for key, tensor in weight.tensors.items()}
            named[f"{base}.quant_state.bitsandbytes__nf4"] = named.pop(f"{base}.quant_state")
            return {base: named.pop(f"{base}.codes"), **named}
        return super().tensors(site, weight)

    def configure(self, config: dict[str, Any], shapes: Shapes) -> None:
        packed = self.of_kind("int8", "nf4")
        names = {site.name for site in packed}
        skip = [
            name
            for site in self.sites
            if site.layout != "embedding" or site.aliases
            for name in (site.name, *site.aliases)
            if site.name not in names
        ]
        quantization: dict[str, Any] = {
            "quant_method": "bitsandbytes",
            "llm_int8_skip_modules": skip,
        }
        spec = self.specs[packed[0].name]
        if spec["kind"] == "int8":
            quantization |= {"load_in_8bit": True, "load_in_4bit": False}
        else:
            quantization |= {
                "load_in_8bit": False,
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_quant_storage": "uint8",
                "bnb_4bit_use_double_quant": spec["double_quant"],
                "bnb_4bit_compute_dtype": spec["dtype"],
            }
        config["quantization_config"] = quantization


class ModellingFile(Format):
    name = "modelling file"
    needs = "transformers with trust_remote_code=True, or compress.load"
    holds_sums = True

    def refusal(self) -> str | None:
        return None

    def _stored(self, site: Site) -> bool:
        return self.specs[site.name]["kind"] != "dense"

    def tensors(self, site: Site, weight: Weight) -> dict[str, Tensor]:
        if not self._stored(site):
            return super().tensors(site, weight)
        # The empty `weight` makes loaders that do not know the format fail (see CompressedModel).
        named = {f"{site.name}.{key}": t for key, t in weight.tensors.items()}
        return {site.parameter: torch.empty(0), **named}

    def configure(self, config: dict[str, Any], shapes: Shapes) -> None:
        cls = self.model_class.__name__
        sites: dict[str, Any] = {}
        for site in self.sites:
            if self._stored(site):
                sites[site.name] = {"spec": self.specs[site.name], "tensors": shapes[site.name]}
                sites |= {alias: {"alias": site.name} for alias in site.aliases}
        config["compressed_sites"] = sites
        config["model_type"] = CUSTOM + self.config.model_type
        config["architectures"] = [f"Compressed{cls}"]
        config["auto_map"] = {"AutoConfig": f"modeling.Compressed{type(self.config).__name__}"}
        for auto in auto_classes(self.model_class, self.config):
            config["auto_map"][auto] = f"modeling.Compressed{cls}"

    def write_files(self, folder: Path) -> None:
        shutil.copyfile(modeling_compressed.__file__, folder / MODELLING)
        cls, config = self.model_class.__name__, type(self.config).__name__
        (folder / "modeling.py").write_text(
            f'"""{cls} with some weights stored compressed; see {MODELLING}."""\n\n'
            f"from transformers import {config}, {cls}\n\n"
            f"from .modeling_compressed import CompressedModel\n\n\n"
            f"class Compressed{config}({config}):\n"
            f'    model_type = "{CUSTOM}{self.config.model_type}"\n\n\n'
            f"class Compressed{cls}(CompressedModel, {cls}):\n"
            f"    config_class = Compressed{config}\n"
        )


FORMATS: tuple[type[Format], ...] = (DenseFormat, CompressedTensors, BitsAndBytes, ModellingFile)


def choose(
    anatomy: Anatomy, specs: dict[str, Spec], model_class: type[Any], config: Any, storage: str
) -> Format:
    """The plainest format that holds these weights as they are.

    A sum is held as its first term, the rest beside it as an adapter, by every format but the
    modelling file. With ``storage`` "compact" sparse weights take the modelling file, too, and
    layers of uneven shapes always do.
    """
    kinds = {spec["kind"] for spec in specs.values()}
    uneven = hasattr(config, "compressed_shapes")
    if not uneven and not (storage == "compact" and "sparse" in kinds):
        bases = {n: s["terms"][0] if s["kind"] == "sum" else s for n, s in specs.items()}
        for cls in FORMATS[:-1]:
            chosen = cls(anatomy, bases, model_class, config, adapter="sum" in kinds)
            if chosen.refusal() is None:
                return chosen
    return ModellingFile(anatomy, specs, model_class, config)


def shapes_of(weight: Weight) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of each of a weight's tensors, by name."""
    return {k: (list(t.shape), str(t.dtype).split(".")[1]) for k, t in weight.tensors.items()}


def auto_classes(model_class: type[Any], config: Any) -> list[str]:
    """The transformers Auto classes that would load this model class."""
    found = []
    for name, auto in sorted(vars(modeling_auto).items()):
        if name.startswith("AutoModel"):
            mapping = getattr(auto, "_model_mapping", None)
            if mapping is not None and type(config) in mapping:
                cls = mapping[type(config)]
                if model_class in (cls if isinstance(cls, tuple) else (cls,)):
                    found.append(name)
    return found or ["AutoModel"]


def compressed_class(model_class: type[Any], config_class: type[Any]) -> tuple[Any, Any]:
    """The model and config classes that the folder's ``modeling.py`` defines."""
    config = type(
        f"Compressed{config_class.__name__}",
        (config_class,),
        {"model_type": CUSTOM + config_class.model_type},
    )
    model = type(
        f"Compressed{model_class.__name__}",
        (modeling_compressed.CompressedModel, model_class),
        {"config_class": config, "__module__": modeling_compressed.__name__},
    )
    return model, config


def plain_classes(raw: dict[str, Any]) -> tuple[type[Any], type[Any]]:
    """The model and config classes of what a folder with a ``modeling.py`` compresses.

    ``raw`` is what its config.json says.
    """
    model = getattr(transformers, raw["architectures"][0].removeprefix("Compressed"))
    return model, CONFIG_MAPPING[raw["model_type"].removeprefix(CUSTOM)]
