"""Teacher-student distillation on logits."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from compress.compressors.base import TrainingRun
from compress.compressors.distillation.recovery import Recovery, vectors


class Distill(Recovery):
    """Train the compressed model to predict as the original does (arXiv 1503.02531).

    loss = kl_share · T²·D(teacher_T, student_T) + (1 − kl_share) · cross-entropy, D a divergence
    (KL(teacher ‖ student) unless said otherwise), with differences of hidden states and attention
    if asked for. What trains is the stored form of the chosen sites: matrices, low-rank factors,
    the surviving values of a sparse matrix (its zeros stay), and with ``norms`` norms and biases.
    Packed weights stay as they are: ``tune_scales`` trains those. With ``teacher`` any small model
    learns from any big one that reads the same tokens.
    """

    default_targets: ClassVar = ("all",)

    norms: bool = Field(True, description="train norms, biases and other vectors as well")

    def trained(self, run: TrainingRun) -> list[Tensor]:
        chosen = vectors(run) if self.norms else []
        for name, parameter in run.student.named_parameters():
            owner, _, leaf = name.rpartition(".")
            spec = getattr(run.student.get_submodule(owner), "spec", {"kind": "dense"})
            matrix = owner in run.sites and leaf != "bias"
            if matrix and parameter.numel() and _trainable(spec):
                chosen.append(parameter)
        return chosen


def _trainable(spec: dict) -> bool:
    """Dense, sparse, and factors of these; packed integers cannot move without re-rounding."""
    if spec["kind"] == "lowrank":
        return _trainable(spec["left"]) and _trainable(spec["right"])
    return spec["kind"] in ("dense", "sparse")
