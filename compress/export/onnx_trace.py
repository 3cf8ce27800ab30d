"""A model folder as an ONNX graph: the architecture, traced with weights as they are stored."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from compress.blockwise import dense_tensor, put
from compress.errors import CheckpointError, first_line
from compress.export import onnx_attention, onnx_modules, onnx_session
from compress.export.base import Held, required
from compress.plain_load import make_inputs
from compress.stored import Stored
from compress.verify import probe_inputs

AUTO = torch.export.Dim.AUTO
PAST = 3  # tokens in the cache of the example, as many as a trace must not take for a constant


def filled(stored: Stored, level: int) -> tuple[nn.Module, dict[str, Held]]:
    """The model with a module of ``onnx_modules`` at every site, and how each site is held.

    A module with a way of its own to use its weight (a scaled embedding) keeps that, and gets the
    expanded matrix. Numbers outside of sites become float32, in which all is computed.
    """
    model = stored.new_skeleton()
    held: dict[str, Held] = {}
    for name, tensor in stored.others().items():
        put(model, stored.anatomy, name, tensor.float() if tensor.is_floating_point() else tensor)
    for site in stored.anatomy.sites:
        weight = stored.weight(site)
        module = model.get_submodule(site.name)
        users = [model.get_submodule(alias) for alias in site.aliases]
        plain = (nn.Linear, Conv1D, nn.Embedding)
        if not all(type(user) in plain for user in [module, *users]):
            matrix = dense_tensor(site, weight).float()
            put(model, stored.anatomy, site.parameter, matrix)
            held[site.name] = "exactly" if weight.kind == "dense" else "expanded"
            continue
        if site.layout == "embedding":
            stand_in = onnx_modules.table(weight)
        else:
            stand_in = onnx_modules.linear(weight, getattr(module, "bias", None), level)
        model.set_submodule(site.name, onnx_modules.with_face(stand_in, module))
        for name, user in zip(site.aliases, users, strict=True):
            bias = getattr(user, "bias", None)
            again = isinstance(user, nn.Embedding)
            head = stand_in if again else onnx_modules.head(stand_in, weight, bias, level)
            model.set_submodule(name, onnx_modules.with_face(head, user))
        held[site.name] = onnx_modules.held(weight)
    return model.eval(), held


def traced(model: Any, where: str) -> Any:
    """The ``onnx_ir.Model`` of a filled model, with the names that ONNX runtimes know.

    Inputs: the model's own; with a cache also past_key_values.<layer>.key and .value, float32
    [batch, heads, past, width]. Outputs: logits, or what comes first, then present.<layer>.*.
    Decoders attend by ``onnx_attention`` where that fits, and then say so in metadata. Their
    logits_from, int64 [1], may be left away: -1 asks for the last token's logits only.

    Raises:
        CheckpointError: transformers cannot export this architecture, or packages are missing.
    """
    ir = required("onnx_ir", "onnx")
    if caches(model):
        _with_choice_of_logits(model)
    # Fusions of norms and rotations upset some graphs.
    ways = [(shared, fusions) for shared in (True, False) for fusions in ("cpu", None)]
    for shared, fusions in ways if caches(model) else ways[2:]:
        try:
            with quiet(), onnx_attention.in_place(model) if shared else contextlib.nullcontext():
                inputs, shapes = example(model, shared)
                program = exported(model, inputs, shapes, fusions)
            if shared:
                onnx_attention.check(program, len(inputs["past_key_values"].layers))
            break
        except Exception as error:
            failure = error
    else:
        raise refused(model, where, failure) from failure
    if shared:
        onnx_attention.without_reshapes(program)
    _renamed(program, caches(model))
    _choice_of_logits(program, ir)
    if shared:
        program.metadata_props[onnx_session.CACHE] = onnx_session.SHARED
    return program


def exported(
    module: nn.Module, inputs: dict[str, Any], shapes: dict[str, Any], fusions: str | None
) -> Any:
    """The ``onnx_ir.Model`` of a module, by transformers' exporter."""
    required("onnxscript", "onnx")
    exporters = required("transformers.exporters.exporter_onnx", "onnx")
    config = exporters.OnnxConfig(dynamic=True, dynamic_shapes=shapes, ort_fusions=fusions)
    return exporters.OnnxExporter().export(module, inputs, config=config).program


def refused(model: Any, where: str, failure: Exception) -> CheckpointError:
    return CheckpointError(
        f"{where}: transformers does not export {type(model).__name__} to ONNX: "
        f"{type(failure).__name__}: {first_line(failure, 200)}"
    )


def caches(model: Any) -> bool:
    """Whether the model is a decoder that keeps keys and values."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


def _with_choice_of_logits(model: Any) -> None:
    """Let the head begin to read at a token that is told; see ``_choice_of_logits``."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            model.set_submodule(name, onnx_modules.Last(head))


def example(model: Any, shared: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs to trace with, of batch 2, and which of their dimensions may change; ``shared``: with
    the cache of ``onnx_attention``."""
    inputs: dict[str, Any] = {
        name: tensor.repeat(2, *[1] * (tensor.dim() - 1))
        for name, tensor in make_inputs(probe_inputs(model)).items()
    }
    shapes: dict[str, Any] = {name: {0: AUTO} for name in inputs}
    if model.main_input_name != "input_ids":
        return inputs, shapes
    tokens = inputs["input_ids"][:, :5]
    batch, length = tokens.shape
    known = inspect.signature(type(model).forward).parameters
    past = PAST if caches(model) else 0
    inputs = {"input_ids": tokens}
    inputs["attention_mask"] = torch.ones(batch, past + length, dtype=torch.int64)
    if "token_type_ids" in known and not past:
        inputs["token_type_ids"] = torch.zeros_like(tokens)
    if "position_ids" in known and past:
        inputs["position_ids"] = torch.arange(past, past + length).repeat(batch, 1)
    shapes = {name: {0: AUTO, 1: AUTO} for name in inputs}
    if past:
        cache = _cache(model, batch, past, shared)
        inputs["past_key_values"] = cache
        shapes["past_key_values"] = [{0: AUTO, 2: AUTO} for _ in range(2 * len(cache.layers))]
    return inputs, shapes


def _cache(model: Any, batch: int, length: int, shared: bool) -> DynamicCache:
    """A cache as the model leaves it; its numbers do not matter.

    Layers with a sliding window keep all tokens as well; the mask leaves out what is too old.
    """
    cache = onnx_attention.PastCache() if shared else DynamicCache()
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        given["position_ids"] = torch.arange(length).repeat(batch, 1)
    with torch.no_grad():  # nodes of torch.onnx.ops.symbolic put out zeros of their shape
        model(**given, past_key_values=cache, use_cache=True)
    return cache


def _renamed(program: Any, cached: bool) -> None:
    """Names as other exporters give them."""
    graph = program.graph
    anonymous(program)
    for value in (*graph.inputs, *graph.outputs):
        parts = value.name.removeprefix("input.").removeprefix("output.").split(".")
        if parts[0] == "past_key_values":
            word = "past_key_values" if value.is_graph_input() else "present"
            value.name = f"{word}.{parts[2]}.{parts[3].removesuffix('s')}"
            names = ["batch", "heads", "past" if value.is_graph_input() else "total", "width"]
        else:
            total = cached and value.name == "attention_mask"
            names = ["batch", "total" if total else "length", *"abc"]
        value.shape = type(value.shape)(
            dim if isinstance(dim, int) else name
            for dim, name in zip(value.shape, names, strict=False)
        )
    if not cached:
        graph.outputs[0].name = "logits"


def anonymous(program: Any) -> None:
    """Take out of a graph what tells where and when it was traced, and shapes in between."""
    graph = program.graph
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = value.type = None  # onnxruntime works them out
    for thing in (program, graph, *graph.inputs, *graph.initializers.values()):
        thing.metadata_props.clear()


def _choice_of_logits(program: Any, ir: Any) -> None:
    """Make an input of where the head begins to read, zero where it is left away."""
    for name, value in list(program.graph.initializers.items()):
        if name.endswith(".first") and value.const_value.numpy().tolist() == [onnx_modules.UNLIKE]:
            value.const_value = ir.tensor([0], dtype=ir.DataType.INT64)
            value.name = onnx_session.LOGITS_FROM
            program.graph.inputs.append(value)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what torch and transformers say while they trace."""
    old = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(io.StringIO()):
                yield
    finally:
        logging.disable(old)
