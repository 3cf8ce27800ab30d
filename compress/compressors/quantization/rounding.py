"""A quantized weight as numbers that can be trained: codes, scales and zero-points of its grid."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.compressors.base import TrainingRun
from compress.errors import RecipeError
from compress.sharded import whole
from compress.weights import Quantized, Weight
from compress.weights.modeling_compressed import Compressed, spread, unpack_codes, zero_points

INSIDE = 0.45  # of a step: how far from its code a weight may start, short of the next one
OWN = 0.6  # of a step, in the mean: nearer to its codes than that a matrix is what they stand for
SCALE = 0.2  # share of a rounding's step that a scale takes


class Rounding(nn.Module):
    """ŵ = s(1 + r)·(clip(round(u + v)) − round(z + y)), where v, r and y are trained.

    ``codes`` [out, in] start at u, ``scales`` and ``zeros`` [out, groups] at s and z. Gradients
    pass through the rounding as if it were not there. ``trains`` says which of the three move.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        tensors: dict[str, Tensor],
        W: Tensor | None,
        trains: Iterable[str] = ("codes", "scales"),
    ) -> None:
        super().__init__()
        self.spec = spec
        self.pace = 4 / 2 ** spec["bits"]  # of a finer grid's steps a smaller share is enough
        scale = tensors["weight_scale"].detach().float()
        start = codes = unpack_codes(spec, tensors).float()
        zero = None if spec["symmetric"] else zero_points(spec, tensors).float()
        if "codes" in trains and W is not None and W.shape == codes.shape:
            zeros = 0.0 if zero is None else self._spread(zero)
            steps = self._spread(scale)
            away = W / steps.where(steps != 0, 1.0) + zeros - codes
            if away.abs().mean() < OWN:  # not a block that has moved up, nor a scaled matrix
                start = codes + away.clamp(-INSIDE, INSIDE)
        self.start: Tensor
        self.scale: Tensor
        self.zero: Tensor | None
        for name, tensor in (("start", start), ("scale", scale), ("zero", zero)):
            self.register_buffer(name, tensor, persistent=False)
        self.offset = _moves(codes, "codes" in trains)
        self.stretch = _moves(scale, "scales" in trains)
        self.shift = _moves(scale, "zeros" in trains and zero is not None)

    def forward(self) -> Tensor:
        zeros = self.zeros()
        codes = self.codes() if zeros is None else self.codes() - self._spread(zeros)
        return codes * self._spread(self.scales())

    def codes(self) -> Tensor:
        """In [−2^(b−1), 2^(b−1)); the gradient passes through the rounding."""
        if self.offset is None:
            return self.start
        return self._rounded(self.start + self.pace * whole(self.offset))

    def scales(self) -> Tensor:
        if self.stretch is None:
            return self.scale
        return self.scale * (1 + SCALE * self.pace * whole(self.stretch))

    def zeros(self) -> Tensor | None:
        if self.shift is None or self.zero is None:
            return self.zero
        return self._rounded(self.zero + self.pace * whole(self.shift))

    def packed(self, weight: Weight) -> Weight:
        """The weight as it is now, stored as ``weight`` was."""
        assert isinstance(weight, Quantized)
        with torch.no_grad():
            half = 2 ** (self.spec["bits"] - 1)
            zeros = self.zeros()
            return Quantized.pack(
                self.codes() + half,
                self.scales().to(weight.tensors["weight_scale"].dtype),
                None if zeros is None else zeros + half,
                bits=self.spec["bits"],
                group=self.spec["group"],
                dtype=weight.dtype,
            )

    def changed(self) -> int:
        """How many codes are not what they were."""
        with torch.no_grad():
            return int((self.codes() != self._rounded(self.start)).sum())

    def _rounded(self, exact: Tensor) -> Tensor:
        half = 2 ** (self.spec["bits"] - 1)
        rounded = exact + (exact.round() - exact).detach()
        return rounded.clamp(-half, half - 1)

    def _spread(self, per_group: Tensor) -> Tensor:
        return spread(per_group, self.spec["group"], self.spec["shape"][1])


class _Rounded:
    """Mixin: the weight is what the rounding being trained makes of it."""

    @property
    def weight(self) -> Tensor:
        matrix = self.rounding().to(self.compute_dtype)  # type: ignore[attr-defined]
        return matrix.T if isinstance(self, Conv1D) else matrix


def install(
    run: TrainingRun, name: str, original: nn.Module | None, trains: Iterable[str]
) -> Rounding:
    """Make a module of the student compute its weight by a ``Rounding`` of its own.

    Raises:
        RecipeError: it is not quantized.
    """
    module = run.student.get_submodule(name)
    if not isinstance(module, Compressed) or module.spec["kind"] != "quantized":
        raise RecipeError(f"{name} is not quantized, so there is no grid to train")
    W = None if original is None else matrix(original, name)
    rounding = Rounding(module.spec, module.tensors(), W, trains)
    module.add_module("rounding", rounding)
    module.__dict__.pop("kept", None)
    module.__class__ = type("Rounded", (_Rounded, type(module)), {})
    return rounding


def repacked(module: nn.Module, weight: Weight) -> Weight:
    """What a module with a rounding holds now, stored as ``weight`` was."""
    rounding = module.get_submodule("rounding")
    assert isinstance(rounding, Rounding)
    return rounding.packed(weight)


def matrix(original: nn.Module, name: str) -> Tensor | None:
    """The original weight [out, in] of a site, where it still exists under that name."""
    try:
        module = original.get_submodule(name)
    except AttributeError:
        return None
    weight = module.get_parameter("weight").detach()
    return weight.T if isinstance(module, Conv1D) else weight


def _moves(like: Tensor, trained: bool) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros_like(like)) if trained else None
