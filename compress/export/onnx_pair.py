"""An encoder-decoder as two ONNX graphs: what is read once, and what writes token by token.

The encoder's graph puts out what the layers of the decoder read of a text or a sound: keys and
values, cross.<layer>.key and .value. These are inputs of the decoder's graph, which keeps keys and
values of its own tokens as any decoder does. So nothing is computed twice, and every matrix is in
the graph that uses it; both lay their numbers in one file, in which a table that both look up is
once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from compress.export import onnx_session
from compress.export.base import required
from compress.export.onnx_trace import AUTO, PAST, anonymous, exported, quiet, refused
from compress.plain_load import make_inputs
from compress.verify import probe_inputs

CROSS = "cross"
# dimensions of inputs and outputs, by what comes first in their names
DIMENSIONS = {
    "input_ids": ("batch", "length"),
    "attention_mask": ("batch", "source"),
    "logits": ("batch", "length", "vocabulary"),
    "last_hidden_state": ("batch", "source", "width"),
    CROSS: ("batch", "heads", "source", "width"),
    "past_key_values": ("batch", "heads", "past", "width"),
    "present": ("batch", "heads", "total", "width"),
}


class Encoder(nn.Module):
    """From the main input to the last hidden state, and to what the decoder's layers read of it.

    The decoder runs for one token to make these; what else it computes is nowhere used, and so in
    no graph.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, attention_mask: Tensor | None = None, **main: Tensor) -> dict[str, Tensor]:
        encoded = self.model.get_encoder()(**main, attention_mask=attention_mask, return_dict=True)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.model(
            encoder_outputs=encoded,
            attention_mask=attention_mask,
            decoder_input_ids=torch.zeros(encoded[0].shape[0], 1, dtype=torch.int64),
            past_key_values=cache,
            use_cache=True,
        )
        return {"last_hidden_state": encoded[0]} | named(CROSS, cache.cross_attention_cache)


class Decoder(nn.Module):
    """From tokens, the keys and values of those before, and the encoder's, to logits."""

    def __init__(self, model: Any, width: int) -> None:
        """``width`` of the encoder's last hidden state."""
        super().__init__()
        self.model, self.width = model, width

    def forward(
        self,
        input_ids: Tensor,
        cross: dict[str, Tensor],
        past_key_values: dict[str, Tensor],
        attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``cross`` and ``past_key_values``: <layer>.key and .value, [batch, heads, length, width];
        ``attention_mask`` [batch, source] of what the encoder read."""
        own, read = (DynamicCache(layers(given)) for given in (past_key_values, cross))
        cache = EncoderDecoderCache(own, read)
        cache.is_updated = dict.fromkeys(range(len(read.layers)), True)
        batch, _, source, _ = next(iter(cross.values())).shape
        output = self.model(
            # Only its shape is looked at, as keys and values of it are there.
            encoder_outputs=BaseModelOutput(torch.zeros(batch, source, self.width)),
            attention_mask=attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return {"logits": output.logits} | named("present", own)


def named(word: str, cache: Any) -> dict[str, Tensor]:
    """``word``.<layer>.key and .value of a cache."""
    return {
        f"{word}.{number}.{kind}": tensor
        for number, layer in enumerate(cache.layers)
        for kind, tensor in (("key", layer.keys), ("value", layer.values))
    }


def layers(given: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values, layer by layer."""
    tensors = list(given.values())
    return zip(tensors[::2], tensors[1::2], strict=True)


def traced(model: Any, where: str) -> dict[str, Any]:
    """The ``onnx_ir.Model`` of the encoder and of the decoder, by the names of their files.

    Raises:
        CheckpointError: transformers cannot export this architecture, or packages are missing.
    """
    main, text = model.main_input_name, model.main_input_name == "input_ids"
    probe = {
        name: tensor.repeat(2, *[1] * (tensor.dim() - 1))
        for name, tensor in make_inputs(probe_inputs(model)).items()
    }
    given = {main: probe[main]}
    if text:
        given = {main: probe[main][:, :7], "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    try:
        with torch.no_grad():  # nodes of torch.onnx.ops.symbolic put out zeros of their shape
            hidden, *keys = Encoder(model)(**given).items()
        cross = {name.removeprefix(f"{CROSS}."): tensor for name, tensor in keys}
        past = {name: tensor[:, :, :1].repeat(1, 1, PAST, 1) for name, tensor in cross.items()}
        written = {
            "input_ids": probe["decoder_input_ids"][:, :5],
            **{name: mask for name, mask in given.items() if name == "attention_mask"},
            CROSS: cross,
            "past_key_values": past,
        }
        return {
            onnx_session.ENCODER: _graph(Encoder(model), given, text, length="source"),
            onnx_session.DECODER: _graph(Decoder(model, hidden[1].shape[2]), written, text),
        }
    except Exception as error:
        raise refused(model, where, error) from error


def _graph(module: nn.Module, inputs: dict[str, Any], text: bool, length: str = "length") -> Any:
    """One graph, whose dimensions have names; the length of what is no ``text`` is fixed."""
    free = {"input_ids": {0: AUTO, 1: AUTO}, "attention_mask": {0: AUTO, 1: AUTO}}
    other = {
        CROSS: {0: AUTO, 2: AUTO} if text else {0: AUTO},
        "past_key_values": {0: AUTO, 2: AUTO},
    }
    shapes = {
        name: dict.fromkeys(value, other[name]) if name in other else free.get(name, {0: AUTO})
        for name, value in inputs.items()
    }
    with quiet():
        try:
            program = exported(module, inputs, shapes, "cpu")
        except Exception:  # fusions of norms and rotations upset some graphs
            program = exported(module, inputs, shapes, None)
    anonymous(program)
    for value in (*program.graph.inputs, *program.graph.outputs):
        names = DIMENSIONS.get(value.name.partition(".")[0], ("batch", *"abc"))
        names = tuple(length if name == "length" else name for name in names)
        value.shape = type(value.shape)(
            dim if isinstance(dim, int) else name
            for dim, name in zip(value.shape, names, strict=False)
        )
    return program


def save(programs: dict[str, Any], out: Path) -> None:
    """Write graphs into a folder, with one file of numbers, in which equal ones lie once."""
    ir = required("onnx_ir", "onnx")
    kept: dict[str, Any] = {}  # digest → tensor
    users: list[tuple[Any, str]] = []
    for program in programs.values():
        for value in program.graph.initializers.values():
            tensor = value.const_value
            if tensor.nbytes > onnx_session.SMALL:
                digest = hashlib.sha256(tensor.tobytes()).hexdigest()
                kept.setdefault(digest, tensor)
                users.append((value, digest))
    moved = ir.external_data.convert_tensors_to_external(
        list(kept.values()), out, onnx_session.DATA
    )
    there = dict(zip(kept, moved, strict=True))
    for value, digest in users:
        place, tensor = there[digest], value.const_value
        value.const_value = ir.ExternalTensor(
            place.location, place.offset, place.length, tensor.dtype,
            name=value.name, shape=tensor.shape, base_dir=out,
        )  # fmt: skip
    for name, program in programs.items():
        ir.save(program, str(out / name))


def logits(encoder: Path, decoder: Path, read: Tensor, written: Tensor) -> Tensor:
    """Of the tokens ``written`` [batch, length], after ``read`` (tokens, or what else is read)."""
    first = onnx_session.Session(encoder)
    feeds = {"attention_mask": torch.ones(read.shape[:2], dtype=torch.int64)}
    cross = first.all(feeds | {first.names[0]: read})
    return onnx_session.Session(decoder).run(feeds | cross | {"input_ids": written})
