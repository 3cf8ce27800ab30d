"""Losses on what lies between: hidden states and attention of chosen layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.compressors.distillation.losses import attention_loss, state_loss
from compress.errors import RecipeError


class Features(nn.Module):
    """hidden · Σ state losses + attention · Σ attention losses, means over mapped layers.

    ``layers`` says for each layer of the student which of the teacher's it follows; without it the
    last follows the last, and the others lie evenly between. Where widths differ the student's
    states go through a trained projection, which is thrown away afterwards.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        hidden: float,
        attention: float,
        layers: list[int] | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.hidden, self.attention = hidden, attention
        ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
        self.layers = layer_map(ours.num_hidden_layers, theirs.num_hidden_layers, layers)
        self.asked = {}
        if hidden:
            self.asked["output_hidden_states"] = True
        if attention:
            self.asked["output_attentions"] = True
            for model in (student, teacher):  # other kernels do not give their probabilities
                model.set_attn_implementation("eager")
        self.projections = nn.ModuleList()
        if hidden and ours.hidden_size != theirs.hidden_size:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for _ in self.layers:
                    linear = nn.Linear(ours.hidden_size, theirs.hidden_size, bias=False)
                    nn.init.orthogonal_(linear.weight)
                    self.projections.append(linear)

    def forward(self, student: Any, teacher: Any, counted: Tensor) -> Tensor:
        """Summed over the tokens that count, bool [windows, positions]."""
        total = torch.zeros((), device=counted.device)
        for ours, theirs in enumerate(self.layers):
            if self.hidden:
                states = student.hidden_states[ours + 1][counted]
                if self.projections:
                    states = self.projections[ours](states)
                goal = teacher.hidden_states[theirs + 1][counted]
                total = total + self.hidden * state_loss(states, goal).sum()
            if self.attention:
                pair = student.attentions[ours], teacher.attentions[theirs]
                total = total + self.attention * attention_loss(*pair)[counted].sum()
        return total / len(self.layers)


def layer_map(ours: int, theirs: int, chosen: list[int] | None) -> list[int]:
    """The teacher's layer that each of the student's follows.

    Raises:
        RecipeError: one is missing, or the teacher has no such layer.
    """
    if chosen is None:
        return [max(0, round((i + 1) * theirs / ours) - 1) for i in range(ours)]
    if len(chosen) != ours or not all(-theirs <= layer < theirs for layer in chosen):
        raise RecipeError(
            f"layers: give {ours} numbers, one for each layer of the student, each the teacher's "
            f"layer that it follows, from 0 to {theirs - 1}"
        )
    return [layer % theirs for layer in chosen]
