"""Models in onnxruntime with the face of transformers': logits, and ``generate`` with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithPast,
    Seq2SeqLMOutput,
)

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
    files = onnx_session.files(folder)
    if not files:
        folder = exported(folder)
        files = onnx_session.files(folder)
    return OnnxModel(folder, threads) if len(files) == 1 else OnnxEncoderDecoder(folder, threads)


def exported(folder: Path) -> Path:
    """The ONNX folder of a checkpoint in the user's cache; written now if it is not there."""
    out = user_cache() / "onnx" / fingerprint(folder)
    if not onnx_session.files(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        export(folder, "onnx", out)
    return out


class OnnxCache(onnx_session.Cache):
    """Keys and values of the tokens read so far, with the face of transformers' caches."""

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


class OnnxModel(PreTrainedModel, GenerationMixin):
    """A model of an exported folder.

    Called with tokens int64 [batch, length] (or images, audio), it gives an output with ``logits``
    float32 [batch, length, vocabulary], or what comes first; decoders also ``generate``, greedily
    or by sampling, with a cache and a streamer. It has no parameters: these are onnxruntime's.
    """

    def __init__(
        self, folder: Path, threads: int | None = None, file: str = onnx_session.FILE
    ) -> None:
        super().__init__(AutoConfig.from_pretrained(folder))
        self.session = Session(folder / file, threads)
        self.main_input_name = self.session.names[0]
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
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values: OnnxCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **other: Tensor,
    ) -> CausalLMOutputWithPast:
        """``attention_mask`` [batch, past + length]; ``past_key_values`` grows by what was read;
        ``logits_to_keep`` last tokens have logits, or all; ``other``: images or audio, by the name
        of the model's input."""
        if input_ids is None:
            return CausalLMOutputWithPast(logits=self.session.run(other))
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


class OnnxEncoder(torch.nn.Module):
    """The first graph of an encoder-decoder: what is read, as ``generate`` hands it about."""

    def __init__(self, file: Path, threads: int | None) -> None:
        super().__init__()
        self.session = Session(file, threads)
        self.main_input_name = self.session.names[0]

    def forward(self, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """Its ``last_hidden_state``, and keys and values by the names that the decoder reads."""
        read = kwargs[self.main_input_name]
        if attention_mask is None:
            attention_mask = torch.ones(read.shape[:2], dtype=torch.int64)
        feeds = {self.main_input_name: read, "attention_mask": attention_mask.long()}
        output = BaseModelOutput()
        for name, tensor in self.session.all(feeds).items():
            output[name] = tensor
        return output


class OnnxEncoderDecoder(OnnxModel):
    """An encoder-decoder: reads once, and writes as a decoder does."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        super().__init__(folder, threads, onnx_session.DECODER)
        self.encoder = OnnxEncoder(folder / onnx_session.ENCODER, threads)
        self.main_input_name = self.encoder.main_input_name

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: OnnxCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        input_features: Tensor | None = None,
    ) -> Seq2SeqLMOutput:
        """``input_ids`` [batch, source] or ``input_features`` are read, the former with an
        ``attention_mask``; logits of the ``decoder_input_ids``, which follow those of the cache."""
        if encoder_outputs is None:
            given = {"input_ids": input_ids, "input_features": input_features}
            encoder_outputs = self.encoder(attention_mask=attention_mask, **given)
        if attention_mask is None:
            attention_mask = torch.ones(encoder_outputs[0].shape[:2], dtype=torch.int64)
        past = past_key_values or OnnxCache()
        feeds: dict[str, Any] = {
            "input_ids": decoder_input_ids,
            "attention_mask": attention_mask.long(),
        }
        logits = self.session.run(feeds | dict(encoder_outputs), past)
        return Seq2SeqLMOutput(
            logits=logits,
            past_key_values=past,  # type: ignore[arg-type]
            encoder_last_hidden_state=encoder_outputs[0],
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: OnnxCache,
        attention_mask: Any = None,
        encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """``input_ids`` [batch, all tokens so far] are those written; see ``forward``."""
        return {
            "decoder_input_ids": input_ids[:, past_key_values.get_seq_length() :],
            "attention_mask": attention_mask,
            "encoder_outputs": encoder_outputs,
            "past_key_values": past_key_values,
        }
