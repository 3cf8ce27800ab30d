"""Attention as onnxruntime's ``GroupQueryAttention``, whose cache is written in place.

Its past may be a buffer longer than what it holds; bound as its present too, nothing is copied for
a new token. So nothing in the graph may be computed from the length of the past: masks take it from
attention_mask [batch, total]. After a past, one new token is read, or several of one sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import causal_mask_function, eager_mask

from compress.export.onnx_modules import DOMAIN

NODE = "GroupQueryAttention"
NAME = "compress_group_query"
# What attention is told beside queries, keys and mask that changes nothing in eager evaluation, or
# (windows) is in the mask.
HARMLESS = {"dropout", "sliding_window", "position_ids", "use_cache", "cache_position", "is_causal",
            "output_attentions", "output_hidden_states", "return_dict"}  # fmt: skip


class DoesNotFit(Exception):
    """Why a model's attention is not this node."""


class Past(DynamicLayer):
    """Keys and values of one layer [batch, heads, past, width], to which the node appends."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """The new keys and values as they are; ``attention`` finds this layer by the keys."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (t[:, :, :0] for t in (key_states, value_states))
        key_states.past = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # ``mask`` does not look at it

    def get_seq_length(self) -> int:
        raise DoesNotFit("the model asks for the length of its cache")


class PastCache(DynamicCache):
    """A cache of ``Past`` layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = Past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0  # ``mask`` does not look at it


def mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
    mask_function: Any = None, attention_mask: Tensor | None = None, **rest: Any,
) -> Tensor:  # fmt: skip
    """float32 [batch, 1, length, total], zero or very low, added to scores; the node itself leaves
    out what comes later."""
    if attention_mask is None:
        raise DoesNotFit("a mask without attention_mask")
    total = attention_mask.shape[-1]
    if mask_function is causal_mask_function:
        low = torch.where(attention_mask, 0.0, torch.finfo(torch.float32).min)
        return low[:, None, None].expand(-1, -1, q_length, -1)
    return eager_mask(
        batch_size, q_length, total, total - q_length, 0, mask_function, attention_mask, **rest
    )


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The node for query [batch, heads, length, width] and new keys and values; its output
    [batch, length, heads, width]."""
    past = getattr(key, "past", None)
    odd = {name for name, given in rest.items() if given is not None} - HARMLESS
    if past is None or attention_mask is None or odd or not getattr(module, "is_causal", True):
        raise DoesNotFit(f"attention with {odd or 'no cache, or not causal'}")
    batch, heads, length, width = query.shape
    if width % 8 or value.shape != key.shape or key.shape[3] != width:
        raise DoesNotFit(f"heads of width {width}")
    total = attention_mask.shape[-1]
    present = (batch, key.shape[1], total, width)
    numbers: dict[str, Any] = {"num_heads": heads, "kv_num_heads": key.shape[1]}
    if scaling is not None:
        numbers["scale"] = float(scaling)
    inputs = [
        *(t.transpose(1, 2).reshape(batch, length, -1) for t in (query, key, value)),
        past.keys, past.values, torch.ones(batch, dtype=torch.int32) * (total - 1),
        torch.ones((), dtype=torch.int32) * total,
        None, None, None, attention_mask,
    ]  # fmt: skip
    output, past.keys, past.values = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{NODE}", inputs, numbers, dtypes=[torch.float32] * 3,
        shapes=[(batch, length, heads * width), present, present], version=1,
    )  # fmt: skip
    return output.view(batch, length, heads, width), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


@contextlib.contextmanager
def in_place(model: Any) -> Iterator[None]:
    """Let a model compute with ``attention``."""
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def without_reshapes(program: Any) -> None:
    """Take out reshapes to a shape that a tensor had before: heads parted and joined again."""
    reshapes = [node for node in program.graph if node.op_type == "Reshape"]
    for node in reshapes:
        found, source = None, node.inputs[0]
        while source is not None:
            found = source if _same(source.shape, node.outputs[0].shape) else found
            before = source.producer()
            source = before.inputs[0] if before and before.op_type == "Reshape" else None
        if found is not None and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(found)
    for node in reversed(reshapes):  # onnxruntime would compute them all the same
        if not (node.outputs[0].uses() or node.outputs[0].is_graph_output()):
            program.graph.remove(node, safe=True)


def _same(one: Any, other: Any) -> bool:
    """Whether both shapes are known, if only by names of dimensions, and equal."""
    known = one is not None and all(isinstance(d, int) or d.value is not None for d in one)
    return known and one == other


def check(program: Any, layers: int) -> None:
    """Raise ``DoesNotFit`` unless every layer's cache goes through a node."""
    found = sum(node.op_type == NODE for node in program.graph.all_nodes())
    if found != layers:
        raise DoesNotFit(f"{found} of {layers} layers attend by {NODE}")
