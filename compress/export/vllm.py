"""Whether vLLM reads a folder, and why not: the rules of its own reader, as they stand in 0.33.0.

    vllm/model_executor/layers/quantization/compressed_tensors/compressed_tensors.py, its schemes
    and compressed_tensors_embedding.py beside it; .../quantization/auto_gptq.py and __init__.py;
    vllm/model_executor/kernels/linear/mixed_precision

These files were read, and the first was run on configs of folders made here, without a GPU: which
scheme every matrix gets is known by that, what kernels compute is not. 4 and 8 bits without
zero-points in groups of 32, 64 and 128 or whole rows, and 4 bits with them, are Marlin's; for all
other integers vLLM has Humming's kernels, on NVIDIA's GPUs only.
"""

from __future__ import annotations

from typing import Any

from compress.anatomy import joined
from compress.formats import Scheme
from compress.stored import Stored

VERSION = "0.33.0"
MARLIN_GROUPS = (32, 64, 128)
HOLDS = {  # kind of weight → in which folders it is read
    "dense": "yes",
    "sparse": "yes, zeros stored: its support for 2:4 is gone",
    "quantized": "in Linear modules, also with 8-bit inputs; what it fuses needs one setting",
    "coded": "no",
    "lowrank": "no",
    "sum": "the packed part alone, unless the adapter is named (--enable-lora --lora-modules)",
    "float8": "yes, with rounded inputs from compute capability 8.9 on",
    "int8": "no: it has no bitsandbytes any more",
    "nf4": "no: it has no bitsandbytes any more",
}


def said(stored: Stored) -> str:
    """A clause for people about vLLM and a folder."""
    reason = refusal(stored)
    if reason is not None:
        return f"does not run it: {reason}"
    others = {
        f"{spec['bits']} bits{'' if spec['symmetric'] else ' with zero-points'} in groups of "
        f"{spec['group']}"
        for spec in _packed(stored).values()
        if spec["kind"] == "quantized" and "activations" not in spec and not _marlin(spec)
    }
    return f"reads it, {', '.join(sorted(others))} by its Humming kernels" if others else "reads it"


def refusal(stored: Stored) -> str | None:
    """Why vLLM would not run the folder as it is; None when it would.

    Raises:
        ValueError: ``quantization_config`` is not one of compressed-tensors.
    """
    if hasattr(stored.config, "compressed_sites") or hasattr(stored.config, "compressed_shapes"):
        return "it has a modelling file of its own"
    if (stored.folder / "adapter_config.json").is_file():
        return (
            "the adapter in the folder would be passed over, unless it is named "
            "(--enable-lora --lora-modules)"
        )
    method = stored.quantization.get("quant_method")
    if method == "bitsandbytes":
        return "it has no bitsandbytes any more"
    if method == "gptq":
        return _gptq(stored.quantization)
    if method == "compressed-tensors":
        return _compressed_tensors(stored)
    return None


def _gptq(said: dict[str, Any]) -> str | None:
    dynamic = said.get("dynamic") or {}
    found = {said["bits"], *(other["bits"] for other in dynamic.values() if "bits" in other)}
    if not said["sym"] or not found <= {4, 8}:
        return "in this layout it takes 4 and 8 bits without zero-points"
    return None


def _compressed_tensors(stored: Stored) -> str | None:
    from compressed_tensors.quantization import QuantizationConfig

    QuantizationConfig.model_validate(stored.quantization)
    packed = _packed(stored)
    for site in stored.anatomy.sites:
        spec = packed.get(site.name)
        if spec is None:
            continue
        if site.layout == "embedding":
            if site.aliases:
                return f"its output heads cannot read a packed embedding ({site.name})"
            if not spec.get("symmetric", True) or spec.get("bits") not in (2, 4, 8):
                return f"its embeddings take 2, 4 and 8 bits without zero-points ({site.name})"
        elif "activations" in spec and spec["kind"] == "quantized":
            rows = spec["group"] == spec["shape"][1]
            if not (rows and spec["symmetric"] and spec["bits"] == 8):
                return f"with 8-bit inputs it takes 8 bits, a scale a row ({site.name})"
    return _fused(stored, packed)


def _fused(stored: Stored, packed: dict[str, dict[str, Any]]) -> str | None:
    """Why matrices that are one there are not of one kind."""
    for sites in joined(stored.anatomy.sites):
        specs = [packed.get(site.name) for site in sites]
        if len({Scheme.of(spec) if spec else None for spec in specs}) > 1:
            names = ", ".join(site.name.rpartition(".")[2] for site in sites)
            parent = sites[0].name.rpartition(".")[0]
            return f"{names} are one matrix there and need one setting ({parent})"
    return None


def _packed(stored: Stored) -> dict[str, dict[str, Any]]:
    return {n: s for n, s in stored.specs.items() if s["kind"] in ("quantized", "float8")}


def _marlin(spec: dict[str, Any]) -> bool:
    bits, group = spec["bits"], spec["group"]
    fits = group in MARLIN_GROUPS or group == spec["shape"][1]
    return fits and bits in ((4, 8) if spec["symmetric"] else (4,))
