"""``gguf``: one file for llama.cpp and what is built on it; transformers reads it, too."""

from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from compress import gguf_file
from compress.anatomy import Site
from compress.checkpoint import record
from compress.export import gguf_blocks, gguf_tokenizer, llama
from compress.export.base import Exporter, Held, required
from compress.export.writing import uneven
from compress.stored import Stored
from compress.weights import Weight

# transformers' model_type → llama.cpp's architecture. A Mistral is a Llama there.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2",
}  # fmt: skip
KEPT = ("name", "base", "parameters", "summary", "families", "recipe")  # of compression.json


class GGUFExporter(Exporter):
    """Integers on our grids become blocks of the type that holds them (gguf_blocks.py), plain
    matrices stay in 16 bits, and the rest is rounded again to ``otherwise``.

    Grids of 2 and 3 bits take the 4 bits of Q4_0, 6 and 7 the 8 bits of Q8_0: GGUF has no plain
    type between.
    """

    needs: ClassVar[str] = "gguf to write; llama.cpp, or transformers with gguf, to read"
    suffix: ClassVar[str] = ".gguf"
    holds: ClassVar[dict[str, str]] = {
        "dense": "exactly",
        "sparse": "expanded: zeros are stored",
        "quantized": "exactly: in groups of a multiple of 32; else rounded again",
        "coded": "rounded again: steps of single columns",
        "lowrank": "expanded: factors are multiplied",
        "sum": "rounded again: what is added has 16 bits",
        "float8": "rounded again",
        "int8": "nearly: scales of 32 bits become 16",
        "nf4": "rounded again: blocks of other values",
    }

    otherwise: Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"] = Field(
        "Q8_0", description="type of packed weights that no type of GGUF holds as they are"
    )

    def refusal(self, stored: Stored) -> str | None:
        config = stored.config
        if config.model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            return f"{config.model_type} is not one of the architectures written here ({known})"
        if not stored.model_class.__name__.endswith(("ForCausalLM", "LMHeadModel")):
            return f"{stored.model_class.__name__} predicts no text"
        return (
            uneven(stored)
            or (_gpt2_refusal(config) if config.model_type == "gpt2" else _llama_refusal(config))
            or gguf_tokenizer.refusal(stored.folder)
        )

    def write(self, stored: Stored, out: Path) -> dict[str, Any]:
        gguf = required("gguf", "gguf")
        config = stored.config
        architecture = ARCHITECTURES[config.model_type]
        writer = gguf.GGUFWriter(out, architecture, use_temp_file=True)
        info = record(stored.folder)
        writer.add_name(info.get("name") or stored.folder.name)
        if info:
            writer.add_string(gguf_file.RECORD, json.dumps({key: info.get(key) for key in KEPT}))
        (_gpt2_numbers if architecture == "gpt2" else _llama_numbers)(writer, config)
        gguf_tokenizer.add(writer, stored.folder, config.vocab_size)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        held, types = self._add_tensors(writer, stored, architecture)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {"held": held, "types": dict(types)}

    def _add_tensors(
        self, writer: Any, stored: Stored, architecture: str
    ) -> tuple[dict[str, Held], Counter[str]]:
        import gguf

        named = gguf.get_tensor_name_map(
            next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture),
            stored.anatomy.layers,
        )
        held: dict[str, Held] = {}
        types: Counter[str] = Counter()
        for block in stored.anatomy.blocks:
            sites = {site.parameter: site for site in block.sites}
            for name in block.tensors:
                target = named.get_name(name, try_suffixes=(".weight", ".bias"))
                if target is None:
                    continue  # a mask that the model computes
                if name not in sites:
                    writer.add_tensor(target, stored.tensor(name).float().numpy())
                    continue
                site = sites[name]
                kind, data, held[site.name] = self._blocks(stored.weight(site))
                types[kind] += 1
                if architecture == "llama":
                    data = _paired(data, site, stored.config)
                writer.add_tensor(
                    target, np.ascontiguousarray(data), raw_dtype=gguf.GGMLQuantizationType[kind]
                )
        return held, types

    def _blocks(self, weight: Weight) -> tuple[str, np.ndarray, Held]:
        """A weight's type, its bytes [out, …], and how it is held."""
        kept = gguf_blocks.carried(weight)
        if kept is not None:
            return kept.type, kept.data, kept.held
        dtype = weight.dtype
        if weight.kind in ("dense", "sparse", "lowrank"):
            return *gguf_blocks.plain(weight.dense(), dtype), (
                "exactly" if weight.kind == "dense" else "expanded"
            )
        if self.otherwise in ("BF16", "F16"):
            dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[self.otherwise]
        elif weight.shape[1] % gguf_blocks.BLOCK == 0:
            import gguf

            kind = gguf.GGMLQuantizationType[self.otherwise]
            return kind.name, gguf.quants.quantize(weight.dense().numpy(), kind), "rounded again"
        return *gguf_blocks.plain(weight.dense(), dtype), "expanded"

    def other_logits(self, out: Path, tokens: Tensor) -> dict[str, Tensor]:
        return {"llama.cpp": llama.logits(out, tokens)} if find_spec("llama_cpp") else {}


def _paired(data: np.ndarray, site: Site, config: Any) -> np.ndarray:
    """Rows of q and k as llama.cpp's rotary embedding wants them: halves of a head interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if site.role not in heads:
        return data
    halves = data.reshape(heads[site.role], 2, -1, data.shape[1])
    return halves.swapaxes(1, 2).reshape(data.shape)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _llama_refusal(config: Any) -> str | None:
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        return f"its rotary embedding is of type {rope['rope_type']}; the default one is written"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "its rotary embedding turns a part of each head only"
    if config.hidden_act not in ("silu", "swish"):
        return f"llama.cpp computes {config.model_type} with silu, not {config.hidden_act}"
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            return f"it has {key}, which readers of {config.model_type} files pass over"
    window = getattr(config, "sliding_window", None)
    sliding = window is not None and getattr(config, "use_sliding_window", True)
    if sliding and window < config.max_position_embeddings:
        return f"its attention sees {window} tokens only; llama.cpp's sees all"
    wide = config.num_attention_heads * _head_dim(config) != config.hidden_size
    if config.model_type in ("llama", "mistral") and wide:
        return "its heads do not fill its width, which readers of llama files do not expect"
    return None


def _llama_numbers(writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _gpt2_refusal(config: Any) -> str | None:
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        return f"llama.cpp computes gpt2 with gelu_new, not {config.activation_function}"
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        return "llama.cpp scales attention by the root of a head's width and by nothing else"
    if config.n_inner not in (None, 4 * config.n_embd):
        return "transformers reads gpt2 files with MLPs four times as wide as the model only"
    return None


def _gpt2_numbers(writer: Any, config: Any) -> None:
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
