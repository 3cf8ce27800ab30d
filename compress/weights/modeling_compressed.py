"""Modules whose weight is stored compressed. This file is also copied into checkpoints.

A weight is a *spec* (JSON: its kind, shape [out, in] and the kind's numbers) and the *tensors* it
is stored as. ``decode`` turns them back into a matrix; it is differentiable in every floating
tensor, so factors, surviving values and scales can be trained where they are. ``attach`` makes any
Linear, Conv1D or Embedding compute its ``weight`` that way, and ``CompressedModel`` does so for
the modules that a config lists, before transformers fills them from a checkpoint.

It needs torch and transformers, and compressed-tensors for packed integers; never ``compress``.
"""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

try:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
except ImportError:  # only packed integers need it
    unpack_from_int32 = None

Spec = dict[str, Any]
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def decode(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """The matrix [out, in] that ``spec`` and ``tensors`` stand for."""
    return _DECODERS[spec["kind"]](spec, tensors)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of a nested weight: those named ``<prefix>_*``, without the prefix."""
    start = prefix + "_"
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}


def _dense(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    return tensors["weight"]


def _sparse(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """values [kept] in row order; mask uint8 [out, ⌈in/8⌉], most significant bit first."""
    kept, values = unmasked(tensors["mask"], spec["shape"][1]), tensors["values"]
    return values.new_zeros(kept.shape).masked_scatter(kept, values)


def unmasked(mask: Tensor, columns: int) -> Tensor:
    """bool [out, columns] of a mask with a bit an entry."""
    shifts = torch.arange(7, -1, -1, device=mask.device, dtype=torch.uint8)
    return ((mask.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :columns].bool()


def _quantized(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """weight_packed int32, weight_scale [out, groups], optional weight_zero_point, packed.

    The layout is compressed-tensors' ``pack-quantized``: integers q in [−2^(b−1), 2^(b−1)), weight
    = (q − zero_point) · scale; the last group of a row may be short.
    """
    return _on_grid(unpack_codes(spec, tensors), spec, tensors)


def _on_grid(codes: Tensor, spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    scale = tensors["weight_scale"]
    group, columns = spec["group"], spec["shape"][1]
    q = codes.to(scale.dtype)
    if "weight_zero_point" in tensors:
        q = q - spread(zero_points(spec, tensors).to(scale.dtype), group, columns)
    return q * spread(scale, group, columns)


def unpack_codes(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """int8 [out, in] in [−2^(b−1), 2^(b−1))."""
    if unpack_from_int32 is None:
        raise ImportError("this checkpoint holds packed integers: pip install compressed-tensors")
    return unpack_from_int32(tensors["weight_packed"], spec["bits"], torch.Size(spec["shape"]))


def _masked(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """As ``_quantized``, symmetric, only the codes within a mask stored."""
    return _on_grid(masked_codes(spec, tensors), spec, tensors)


def masked_codes(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """int8 [out, in], zero outside of the mask."""
    kept = unmasked(tensors["mask"], spec["shape"][1])
    codes = unpack_codes(spec | {"shape": [1, spec["kept"]]}, tensors)
    return codes.new_zeros(kept.shape).masked_scatter(kept, codes)


def zero_points(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """int8 [out, groups] of a weight that is not symmetric."""
    # Packed along the rows. Transposed and copied first: of a single row of words, which any
    # stride fits, compressed-tensors' own packed_dim=0 makes an error at 4 bits.
    words = tensors["weight_zero_point"].T.clone(memory_format=torch.contiguous_format)
    shape = torch.Size((tensors["weight_scale"].shape[1], spec["shape"][0]))
    return unpack_from_int32(words, spec["bits"], shape).T


def spread(per_group: Tensor, group: int, columns: int) -> Tensor:
    """Repeat [out, groups] along each group: [out, columns]."""
    return per_group.repeat_interleave(group, dim=1)[:, :columns]


def round_tokens(x: Tensor, numbers: int | str) -> Tensor:
    """x [..., in] with every token on a symmetric grid of its own, whose end is its max |x|.

    ``numbers``: how many bits integers have, or "float8" for those of float8_e4m3fn. In the dtype
    of x, as compressed-tensors does it. The gradient passes as if nothing was rounded.
    """
    fixed = x.detach()
    low, high = -LARGEST, LARGEST
    if isinstance(numbers, int):
        low, high = -(2.0 ** (numbers - 1)), 2.0 ** (numbers - 1) - 1
    step = fixed.abs().amax(-1, keepdim=True) / ((high - low) / 2)
    step = step.where(step != 0, 1.0)
    codes = fixed / step
    if isinstance(numbers, int):
        codes = codes.round().clamp(low, high)
    else:
        codes = codes.clamp(low, high).to(torch.float8_e4m3fn).to(x.dtype)
    rounded = codes * step
    return x + (rounded - fixed) if x.requires_grad else rounded


def _lowrank(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """left [out, rank] @ right [rank, in]; each factor is itself a weight of any kind."""
    left, right = factors(spec, tensors)
    return left @ right


def factors(spec: Spec, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    left = decode(spec["left"], part(tensors, "left"))
    right = decode(spec["right"], part(tensors, "right"))
    return left, right.to(left.dtype)


def _sum(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    terms = [decode(term, part(tensors, f"term{i}")) for i, term in enumerate(spec["terms"])]
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total.dtype)
    return total


def _int8(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """bitsandbytes LLM.int8: codes int8 [out, in], SCB float32 [out] = absmax of the row."""
    return tensors["codes"].to(torch.float32) * (tensors["SCB"].float() / 127.0).unsqueeze(1)


def _float8(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """codes uint8 [out, in], the bits of float8_e4m3fn; weight_scale [out, 1]."""
    return tensors["codes"].view(torch.float8_e4m3fn).float() * tensors["weight_scale"].float()


def _coded(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """Codes in a stream, times the step of each weight."""
    return read_stream(spec, tensors) * steps(spec, tensors["row"], tensors["column"])


def _huffman(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """As ``_quantized``, the codes in a stream."""
    return _on_grid(read_stream(spec, tensors), spec, tensors)


def read_stream(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """int32 [out, in] of stream uint8: deflated symbols of ``digits`` codes in base ``levels``,
    then the ``rare`` codes, int16, that the last level stands for."""
    rows, columns = spec["shape"]
    stream = tensors["stream"].cpu().numpy().tobytes()
    end = len(stream) - 2 * spec.get("rare", 0)
    symbols = torch.frombuffer(bytearray(zlib.decompress(stream[:end], -15)), dtype=torch.uint8)
    powers = spec["levels"] ** torch.arange(spec["digits"], dtype=torch.int32)
    digits = (symbols.int()[:, None] // powers) % spec["levels"]
    codes = digits.view(-1)[: rows * columns] + spec["low"]
    if end < len(stream):
        rare = torch.frombuffer(bytearray(stream[end:]), dtype=torch.int16).int()
        codes[codes == spec["low"] + spec["levels"] - 1] = rare
    return codes.view(rows, columns)


def steps(spec: Spec, row: Tensor, column: Tensor) -> Tensor:
    """float32 [out, in] of rows uint8 [out] and columns uint8 [in], eighths of doublings."""
    exponents = (row.float() - 128)[:, None] + (column.float() - 128)
    return spec["step"] * torch.exp2(exponents / 8)


def _nf4(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """bitsandbytes NF4: two codes a byte (first in the high half), one absmax a block."""
    state = json.loads(bytes(tensors["quant_state"].tolist()).decode())
    absmax = tensors["absmax"]
    if "nested_absmax" in tensors:  # the absmax values are themselves quantized, 8 bits a value
        outer = tensors["nested_absmax"].repeat_interleave(state["nested_blocksize"])
        absmax = tensors["nested_quant_map"][absmax.long()] * outer[: absmax.numel()]
        absmax = absmax + state["nested_offset"]
    packed = tensors["codes"].view(-1)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)
    rows, columns = spec["shape"]
    values = tensors["quant_map"][codes.long()][: rows * columns]
    scale = absmax.repeat_interleave(state["blocksize"])[: rows * columns]
    return (values * scale).view(rows, columns)


_DECODERS = {"dense": _dense, "sparse": _sparse, "quantized": _quantized, "lowrank": _lowrank,
             "sum": _sum, "float8": _float8, "int8": _int8, "nf4": _nf4,
             "coded": _coded, "huffman": _huffman, "masked": _masked}  # fmt: skip


class Compressed(nn.Module):
    """Mixin for a module whose ``weight`` is decoded from stored tensors when it is read.

    The decoded matrix, or its decoded factors, are kept after the first use, unless the stored
    tensors are being trained.
    """

    spec: Spec
    stored: list[str]
    compute_dtype: torch.dtype

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, by their names in the module's state dict."""
        return {name: getattr(self, name) for name in self.stored}

    @property
    def weight(self) -> Tensor:
        kept = self.__dict__.get("kept")
        if kept is not None:
            return kept
        matrix = decode(self.spec, self.tensors()).to(self.compute_dtype)
        if isinstance(self, Conv1D):
            matrix = matrix.T.contiguous()
        setattr(matrix, "_is_hf_initialized", True)  # noqa: B010 - transformers must not fill it
        if self._keeps(matrix):
            self.__dict__["kept"] = matrix
        return matrix

    def factors(self) -> tuple[Tensor, Tensor]:
        """left [out, rank] and right [rank, in] of a low-rank weight."""
        kept = self.__dict__.get("kept_factors")
        if kept is not None:
            return kept
        left, right = factors(self.spec, self.tensors())
        if self._keeps(left):
            self.__dict__["kept_factors"] = left, right
        return left, right

    def _keeps(self, decoded: Tensor) -> bool:
        trained = any(p.requires_grad for p in self.parameters(recurse=False))
        return not trained and decoded.device.type != "meta"

    def _forget(self) -> None:
        self.__dict__.pop("kept", None)
        self.__dict__.pop("kept_factors", None)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        if "activations" in self.spec:
            inputs = (round_tokens(inputs[0], self.spec["activations"]), *inputs[1:])
        if self.spec["kind"] != "lowrank" or isinstance(self, nn.Embedding):
            return super().forward(*inputs, **named)
        x = inputs[0] if inputs else named["input"]
        left, right = self.factors()  # two thin products, never the matrix
        y = nn.functional.linear(x, right.to(x.dtype))
        return nn.functional.linear(y, left.to(x.dtype), getattr(self, "bias", None))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Where .to(), .half() and .cuda() pass: forget what was kept, follow the dtype."""
        self._forget()
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)


class Alias(Compressed):
    """A module tied to a compressed one: it reads the other's weight (an output head, mostly)."""

    @property
    def weight(self) -> Tensor:
        return self.__dict__["source"].weight

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return super(Compressed, self).forward(*inputs, **named)  # the module's own


def attach(module: nn.Module, spec: Spec, tensors: dict[str, Tensor]) -> nn.Module:
    """Make ``module`` compute its weight from ``tensors``; its own forward stays in use."""
    module.__dict__["compute_dtype"] = module.get_parameter("weight").dtype
    module.__dict__["spec"] = spec
    module.__dict__["stored"] = list(tensors)
    module.__class__ = _subclass(Compressed, type(module))
    del module._parameters["weight"]
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            module.register_buffer(name, tensor)
    _initialized(module)
    return module


def attach_alias(module: nn.Module, source: nn.Module) -> nn.Module:
    """Make ``module`` read the weight of ``source``, which has been attached."""
    module.__class__ = _subclass(Alias, type(module))
    module.__dict__["source"] = source  # not a submodule: the tensors are stored once
    module.__dict__["compute_dtype"] = source.compute_dtype
    del module._parameters["weight"]
    _initialized(module)
    return module


def resize(model: nn.Module, sizes: dict[str, dict[str, int]]) -> None:
    """Make modules as large as their constructors would with other numbers.

    ``sizes``: {module: {attribute: number}}, e.g. ``in_features`` of a Linear or ``num_heads``.
    """
    for name, numbers in sizes.items():
        module = model.get_submodule(name)
        for key, number in numbers.items():
            setattr(module, key, number)
        if isinstance(module, nn.Linear):
            shape, rows = (module.out_features, module.in_features), module.out_features
        elif isinstance(module, Conv1D):
            shape, rows = (module.nx, module.nf), module.nf
        else:
            continue
        for key, size in (("weight", shape), ("bias", (rows,))):
            old = module._parameters.get(key)
            if old is not None:
                new = torch.empty(size, dtype=old.dtype, device=old.device)
                module._parameters[key] = nn.Parameter(new, requires_grad=old.requires_grad)


def _initialized(module: nn.Module) -> None:
    """Tell transformers that there is nothing to initialise but buffers no checkpoint holds."""
    module.__dict__["_is_hf_initialized"] = not module._non_persistent_buffers_set


def _subclass(mixin: type, cls: type) -> type:
    return type(mixin.__name__ + cls.__name__, (mixin, cls), {})


class CompressedModel(nn.Module):
    """Mixin for a model class: ``config.compressed_sites`` says which modules are compressed how.

    compressed_sites: {module: {"spec": …, "tensors": {name: [shape, dtype]}}} or, for a module
    tied to another, {module: {"alias": other}}. Besides these tensors a checkpoint holds an empty
    ``<module>.weight``: a loader that does not know the format fails on its shape, where it would
    fill a missing one with random numbers. compressed_shapes: {module: {attribute: number}}, sizes
    that differ from layer to layer.
    """

    config: Any
    all_tied_weights_keys: dict[str, str]
    _keys_to_ignore_on_load_unexpected: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # the model class behind this mixin
        resize(self, getattr(config, "compressed_shapes", {}))
        for name, site in config.compressed_sites.items():
            if "alias" in site:
                attach_alias(self.get_submodule(name), self.get_submodule(site["alias"]))
            else:
                empty = {
                    key: torch.empty(shape, dtype=getattr(torch, dtype))
                    for key, (shape, dtype) in site["tensors"].items()
                }
                attach(self.get_submodule(name), site["spec"], empty)
        guards = {re.escape(f"{name}.weight") for name in config.compressed_sites}
        self._keys_to_ignore_on_load_unexpected = guards | set(
            self._keys_to_ignore_on_load_unexpected or ()
        )
        self.all_tied_weights_keys = self._still_tied(self.all_tied_weights_keys)

    def get_expanded_tied_weights_keys(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        tied = super().get_expanded_tied_weights_keys(*args, **kwargs)  # type: ignore[misc]
        return self._still_tied(tied)

    def _still_tied(self, tied: dict[str, str]) -> dict[str, str]:
        """Ties between modules that are compressed are kept by aliases, not by transformers."""
        decoded = {f"{name}.weight" for name in self.config.compressed_sites}
        return {target: source for target, source in tied.items() if not {target, source} & decoded}
