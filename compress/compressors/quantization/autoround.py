"""Rounding learned by gradient steps, from a quantized model on."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.anatomy import Site
from compress.compressors.base import TrainingRun
from compress.compressors.distillation.recovery import Recovery
from compress.errors import RecipeError
from compress.weights import Quantized, Weight
from compress.weights.modeling_compressed import Compressed, spread, unpack_codes, zero_points

INSIDE = 0.45  # of a step: how far from its code a weight may start, short of the next one
SCALE = 0.2  # share of a rounding's step that a scale takes


class AutoRound(Recovery):
    """Learn which way each weight is rounded, and its scale, so that the model predicts as before.

    ŵ = s(1 + r)·(clip(round(u + v)) − z): codes u are where an earlier stage put them, v and r are
    trained through the rounding as if it were not there (AutoRound, arXiv 2309.05516), but on the
    whole model's KL to the original instead of one block's output, and from gptq's codes. Bytes
    and format stay as they are.
    """

    family: ClassVar = "quantization"
    accepts: ClassVar = frozenset({"quantized"})
    layouts: ClassVar = frozenset({"linear", "conv1d", "embedding"})

    steps: int = Field(200, ge=1, description="optimizer steps")
    learning_rate: float = Field(
        5e-3, gt=0, description="highest learning rate, in steps of a 2-bit grid; finer grids less"
    )
    samples: int = Field(128, ge=2, description="windows of text; an eighth is held out")
    kl_share: float = Field(1.0, ge=0, le=1, description="weight of KL; cross-entropy has the rest")

    def trained(self, run: TrainingRun) -> list[Tensor]:
        original = run.teacher()
        chosen: list[Tensor] = []
        for name in sorted(run.sites):
            module = run.student.get_submodule(name)
            if not isinstance(module, Compressed) or module.spec["kind"] != "quantized":
                raise RecipeError(f"autoround: {name} is not quantized")
            rounding = Rounding(module.spec, module.tensors(), _matrix(original, name))
            module.add_module("rounding", rounding)
            module.__dict__.pop("kept", None)
            module.__class__ = type("Rounded", (_Rounded, type(module)), {})
            chosen += rounding.parameters()
        return chosen

    def finish(self, module: nn.Module, site: Site, weight: Weight) -> Weight:
        rounding = module.get_submodule("rounding")
        assert isinstance(rounding, Rounding)
        return rounding.packed(weight)


class Rounding(nn.Module):
    """Codes and scales of one weight, as numbers that can be trained."""

    def __init__(self, spec: dict[str, Any], tensors: dict[str, Tensor], W: Tensor | None) -> None:
        super().__init__()
        self.spec = spec
        self.pace = 4 / 2 ** spec["bits"]  # of a finer grid's steps a smaller share is enough
        self.scale = tensors["weight_scale"].detach().float()
        codes = unpack_codes(spec, tensors).float()
        self.zero = zero_points(spec, tensors).float() if not spec["symmetric"] else None
        self.start = codes
        if W is not None and W.shape == codes.shape:
            self.start = codes + (W / self._spread(self.scale) + self._zero() - codes).clamp(
                -INSIDE, INSIDE
            )
        self.offset = nn.Parameter(torch.zeros_like(codes))
        self.stretch = nn.Parameter(torch.zeros_like(self.scale))

    def forward(self) -> Tensor:
        return (self.codes() - self._zero()) * self._spread(self.scales())

    def codes(self) -> Tensor:
        """In [−2^(b−1), 2^(b−1)); the gradient passes through the rounding."""
        half = 2 ** (self.spec["bits"] - 1)
        exact = self.start + self.pace * self.offset
        rounded = exact + (exact.round() - exact).detach()
        return rounded.clamp(-half, half - 1)

    def scales(self) -> Tensor:
        return self.scale * (1 + SCALE * self.pace * self.stretch)

    def packed(self, weight: Weight) -> Weight:
        """The weight as it is now, stored as ``weight`` was."""
        assert isinstance(weight, Quantized)
        with torch.no_grad():
            scale = self.scales().to(weight.tensors["weight_scale"].dtype)
            half = 2 ** (self.spec["bits"] - 1)
            return Quantized.pack(
                self.codes() + half,
                scale,
                None if self.zero is None else self.zero + half,
                bits=self.spec["bits"],
                group=self.spec["group"],
                dtype=weight.dtype,
            )

    def _zero(self) -> Tensor | float:
        return 0.0 if self.zero is None else self._spread(self.zero)

    def _spread(self, per_group: Tensor) -> Tensor:
        return spread(per_group, self.spec["group"], self.spec["shape"][1])


class _Rounded:
    """Mixin: the weight is what the rounding being trained makes of it."""

    @property
    def weight(self) -> Tensor:
        matrix = self.rounding().to(self.compute_dtype)  # type: ignore[attr-defined]
        return matrix.T if isinstance(self, Conv1D) else matrix


def _matrix(original: nn.Module, name: str) -> Tensor | None:
    """The original weight [out, in] of a site, where it still exists under that name."""
    try:
        module = original.get_submodule(name)
    except AttributeError:
        return None
    weight = module.get_parameter("weight").detach()
    return weight.T if isinstance(module, Conv1D) else weight
