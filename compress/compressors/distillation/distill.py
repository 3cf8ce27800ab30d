"""Teacher-student distillation on logits."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

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

    Where much is asked of each token (``hidden``), ``optimizer: muon`` gets further in as many
    steps: matrices of the blocks move by their gradients' running mean with all singular values
    made about equal (Jordan et al. 2024, kellerjordan.github.io/posts/muon), the rest by AdamW.
    """

    default_targets: ClassVar = ("all",)

    norms: bool = Field(True, description="train norms, biases and other vectors as well")

    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="what moves the blocks' matrices; AdamW moves all else"
    )

    def trained(self, run: TrainingRun) -> list[Tensor]:
        chosen = vectors(run) if self.norms else []
        for name, parameter in run.student.named_parameters():
            owner, _, leaf = name.rpartition(".")
            spec = getattr(run.student.get_submodule(owner), "spec", {"kind": "dense"})
            matrix = owner in run.sites and leaf != "bias"
            if matrix and parameter.numel() and _trainable(spec):
                chosen.append(parameter)
        return chosen

    def matrices(self, run: TrainingRun) -> frozenset[str]:
        if self.optimizer == "adamw":
            return frozenset()
        layers = run.student.named_modules()
        blocks = tuple(f"{n}." for n, m in layers if isinstance(m, GradientCheckpointingLayer))
        return frozenset(
            name
            for name, p in run.student.named_parameters()
            if p.requires_grad and p.ndim == 2 and name.startswith(blocks)
        )


def _trainable(spec: dict) -> bool:
    """Dense, sparse, and factors of these; packed integers cannot move without re-rounding."""
    if spec["kind"] == "lowrank":
        return _trainable(spec["left"]) and _trainable(spec["right"])
    return spec["kind"] in ("dense", "sparse")
