"""The one training loop: AdamW, warm-up and cosine decay, clipping, early stop, resume.

It runs on accelerate, so a launcher decides devices and processes. The order of the text depends
on the seed and the step alone and every tensor of the state is saved, so a run that was killed and
resumed ends with the same bytes as one that was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn

from compress.store import SafetensorsWriter

STATE = "training.safetensors"
Loss = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. ``patience`` checks without a better held-out loss end the run."""

    steps: int
    learning_rate: float
    batch: int
    warmup: float = 0.05
    clip: float = 1.0
    weight_decay: float = 0.0
    check_every: int = 25
    patience: int = 6

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, …: linear warm-up, then cosine decay to a tenth."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        progress = (step - warm) / max(1, self.steps - warm)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def fit(
    model: nn.Module,
    trained: Sequence[Tensor],
    loss: Loss,
    held_loss: Loss,
    *,
    train: Tensor,
    held: Tensor,
    schedule: Schedule,
    seed: int,
    folder: Path,
    report: Callable[[int, int, dict[str, float]], None],
) -> dict[str, Any]:
    """Train the parameters ``trained`` of ``model`` and leave the best held-out ones in place.

    ``train`` and ``held`` are int64 and are cut into batches along their first dimension: windows
    of tokens, or their numbers. Both losses return a scalar, nats a token.
    Returns steps taken, the best step, and the held-out loss before, best and last.
    """
    accelerator = Accelerator(mixed_precision="bf16" if _has_bf16() else "no")
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=schedule.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)

    def check() -> float:
        with torch.no_grad():
            losses = [held_loss(model, b).item() * len(b) for b in held.split(schedule.batch)]
        return sum(losses) / len(held)

    progress = _Progress(folder / STATE, list(trained), optimizer)
    if not progress.resume():
        progress.start(check())
    while progress.step < schedule.steps and progress.waited < schedule.patience:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(progress.step)
        batch = train[_batch(progress.step, len(train), schedule.batch, seed)]
        with accelerator.autocast():
            value = loss(model, batch)
        accelerator.backward(value)
        accelerator.clip_grad_norm_(trained, schedule.clip)
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        numbers = {"loss": value.item()}
        if progress.step % schedule.check_every == 0 or progress.step == schedule.steps:
            progress.checked(check())
            numbers["held"] = progress.last
        report(progress.step, schedule.steps, numbers)
    progress.restore_best()
    return progress.summary()


class _Progress:
    """Where the training stands, in memory and in its state file."""

    def __init__(self, path: Path, trained: list[Tensor], optimizer: Any) -> None:
        self.path, self.trained, self.optimizer = path, trained, optimizer
        self.step = self.waited = self.best_step = 0
        self.before = self.best = self.last = math.inf
        self.best_values: list[Tensor] = []

    def start(self, before: float) -> None:
        self.before = self.best = self.last = before
        self._keep()

    def checked(self, held: float) -> None:
        self.last = held
        if held < self.best:
            self.best, self.best_step, self.waited = held, self.step, 0
            self._keep()
        else:
            self.waited += 1
        self._save()

    def _keep(self) -> None:
        self.best_values = [p.detach().clone() for p in self.trained]

    def restore_best(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.trained, self.best_values, strict=True):
                parameter.copy_(value)

    def summary(self) -> dict[str, Any]:
        return {
            "steps": self.step,
            "best_step": self.best_step,
            "held_out_loss": {
                "before": round(self.before, 6),
                "best": round(self.best, 6),
                "last": round(self.last, 6),
            },
        }

    def _save(self) -> None:
        numbers = {
            k: getattr(self, k) for k in ("step", "waited", "best_step", "before", "best", "last")
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        writer = SafetensorsWriter(self.path, {"progress": json.dumps(numbers)})
        state = self.optimizer.state
        for i, parameter in enumerate(self.trained):
            writer.add(f"{i}.now", parameter)
            writer.add(f"{i}.best", self.best_values[i])
            for key, value in state[parameter].items():  # empty if it never had a gradient
                writer.add(f"{i}.{key}", value)
        writer.close()

    def resume(self) -> bool:
        if not self.path.exists():
            return False
        with safe_open(self.path, framework="pt") as file:
            for key, value in json.loads(file.metadata()["progress"]).items():
                setattr(self, key, value)
            held = set(file.keys())
            for i, parameter in enumerate(self.trained):
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(f"{i}.now"))
                self.best_values.append(file.get_tensor(f"{i}.best").to(parameter.device))
                self.optimizer.state[parameter] = {
                    key: file.get_tensor(f"{i}.{key}").to(
                        parameter.device if key != "step" else "cpu"
                    )
                    for key in ("exp_avg", "exp_avg_sq", "step")
                    if f"{i}.{key}" in held
                }
        return True


def _batch(step: int, count: int, size: int, seed: int) -> Tensor:
    """Indices of the windows of one step: every window once an epoch, in a seeded order."""
    size = min(size, count)
    per_epoch = count // size
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)[place * size : (place + 1) * size]


def _has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
