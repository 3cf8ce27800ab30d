"""Models in onnxruntime with the face of transformers': logits, and ``generate`` with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from compress.checkpoint import fingerprint
from compress.errors import RecipeError
from compress.export import onnx_session
from compress.export.export import export
from compress.export.onnx_session import Session, text_feeds
from compress.source import resolve
from compress.workdir import user_cache


def load(path: str | Path, *, threads: int | None = None) -> OnnxModel:
    """The model in a folder that was exported to ``onnx``, or in any other checkpoint folder.

    The latter is exported first, into a folder of the user's cache whose name is the digest of its
    weights, once. Threads are torch's unless given.

    Raises:
        ModelError: not a model folder. CheckpointError: it cannot be exported, or not be run.
    """
    folder = resolve(path)
    if not (folder / onnx_session.FILE).is_file():
        folder = exported(folder)
    return OnnxModel(folder, threads)


def exported(folder: Path) -> Path:
    """The ONNX folder of a checkpoint in the user's cache; written now if it is not there."""
    out = user_cache() / "onnx" / fingerprint(folder)
    if not (out / onnx_session.FILE).is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        export(folder, "onnx", out)
    return out


class OnnxCache(onnx_session.Cache):
    """Keys and values of the tokens read so far, with the face of transformers' caches."""

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


class OnnxModel(PreTrainedModel, GenerationMixin):
    """A text model of an exported folder.

    Called with tokens int64 [batch, length], it gives an output with ``logits`` float32 [batch,
    length, vocabulary]; decoders also ``generate``, greedily or by sampling, with a cache and a
    streamer. It has no parameters: these are onnxruntime's.
    """

    main_input_name = "input_ids"

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        super().__init__(AutoConfig.from_pretrained(folder))
        self.session = Session(folder / onnx_session.FILE, threads)
        self.name_or_path = str(folder)
        if (folder / "generation_config.json").is_file():
            self.generation_config = GenerationConfig.from_pretrained(folder)
        else:
            self.generation_config = GenerationConfig.from_model_config(self.config)
        self.eval()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def can_generate(self) -> bool:  # type: ignore[override]
        return hasattr(self, "session") and bool(self.session.past)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values: OnnxCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """``attention_mask`` [batch, past + length]; ``past_key_values`` grows by what was read;
        ``logits_to_keep`` last tokens have logits, or all."""
        past = past_key_values or OnnxCache()
        feeds = text_feeds(input_ids, attention_mask, past.get_seq_length())
        given = {"position_ids": position_ids, "token_type_ids": token_type_ids}
        feeds |= {name: tensor for name, tensor in given.items() if tensor is not None}
        feeds[onnx_session.LOGITS_FROM] = torch.tensor([-logits_to_keep])
        logits = self.session.run(feeds, past)[:, -logits_to_keep:]
        cache: Any = past if self.session.past else None
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: OnnxCache,
        attention_mask: Any = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> dict[str, Any]:
        """What ``forward`` reads next of ``input_ids`` [batch, all tokens so far]."""
        return {
            "input_ids": input_ids[:, past_key_values.get_seq_length() :],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "logits_to_keep": logits_to_keep,
        }

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        """What ``generate`` starts from.

        Raises:
            RecipeError: beams, whose caches would change places.
        """
        if generation_config.num_beams > 1:
            raise RecipeError("runtime onnx generates greedily or by sampling; num_beams must be 1")
        generation_config.use_cache = True
        model_kwargs["use_cache"] = True
        model_kwargs.setdefault("past_key_values", OnnxCache())
