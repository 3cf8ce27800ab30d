"""The one training loop: AdamW or Muon, warm-up and cosine decay, clipping, early stop, resume.

It runs on accelerate, so a launcher decides devices and processes. A step's text depends on the
seed and the step alone, losses are summed over the tokens of the whole step, and every tensor of
the state is saved: so a run that was killed and resumed ends with the same bytes as one that was
not, and several processes, or a step taken in pieces, give the same loss curve as one.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors import safe_open
from torch import Tensor, nn

from compress import distributed, sharded, zero
from compress.errors import RecipeError
from compress.memory import keep_large
from compress.muon import Muon
from compress.sharded import like, whole
from compress.store import SafetensorsWriter
from compress.zero import Zero

STATE = "training.safetensors"
Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]
Keep: TypeAlias = Literal["best", "last"]
Report: TypeAlias = Callable[[int, int, dict[str, float]], None]


class Objective(nn.Module, ABC):
    """What training lowers: a module, so that whatever runs, runs inside what a launcher wraps.

    Those of its parameters that require a gradient are trained.
    """

    @abstractmethod
    def forward(self, rows: Tensor, step: int | None) -> Tensor:
        """The loss of these windows, nats summed over all tokens that count.

        ``rows`` is a part of what ``Trainer.fit`` was given. Without a step: the held-out loss.
        """

    def count(self, rows: Tensor, step: int | None) -> int:
        """How many tokens count."""
        return len(rows)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. ``patience`` checks without a better held-out loss end the run.

    Where the ``last`` step is to be kept, nothing ends it early. A step takes ``batch`` windows
    over all processes; each takes its share in ``accumulate`` pieces, one in memory at a time.
    """

    steps: int
    learning_rate: float
    batch: int
    accumulate: int = 1
    warmup: float = 0.05
    clip: float = 1.0
    weight_decay: float = 0.0
    check_every: int = 25
    patience: int = 6
    keep: Keep = "best"
    begin: float = 0.1  # share of the steps after which what comes later moves as well
    floor: float = 0.1  # share of the learning rate that is left at the end

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, …: linear warm-up, then cosine decay to ``floor``."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        progress = (step - warm) / max(1, self.steps - warm)
        fall = (1 - self.floor) / 2 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * (self.floor + fall)


class Trainer:
    """Trains an objective, and keeps it ready to be asked for its held-out loss.

    ``report`` is called after every step with its number, how many there are, and numbers: loss,
    tokens a second (of windows of ``length`` tokens), seconds left, and at a check held.
    Parameters whose name is ``later`` stay as they are for the first ``begin`` of the steps. Muon
    moves those that are a ``matrix`` by name, AdamW all others.
    """

    def __init__(
        self,
        objective: Objective,
        schedule: Schedule,
        *,
        seed: int,
        folder: Path,
        report: Report,
        precision: Precision = "auto",
        length: int = 1,
        later: Callable[[str], bool] = lambda name: False,
        matrix: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.objective, self.schedule, self.seed, self.length = objective, schedule, seed, length
        self.report, self.processes = report, distributed.size()
        options = DistributedDataParallelKwargs(
            broadcast_buffers=False, find_unused_parameters=True
        )
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision="no",
            kwargs_handlers=[options],
        )
        self.half = precision == "bfloat16" or (precision == "auto" and _has_bf16())
        self.model: Any
        if zero.wanted():
            self.model = objective.to(self.accelerator.device)
        elif sharded.wanted():
            self.model = sharded.shard(objective.to(self.accelerator.device))
        else:
            self.model = self.accelerator.prepare_model(objective)
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.trained = [p for _, p in named]
        self.optimizers = _optimizers(named, schedule.weight_decay, later, matrix)
        self.zero: Zero | None = None
        if zero.wanted():
            (adamw,) = self.optimizers
            pieces, clip = schedule.accumulate, schedule.clip
            self.zero = Zero(objective, adamw, pieces=pieces, clip=clip, half=self.half)
            self.model = self.zero.engine
        self.progress = _Progress(folder / STATE, self.trained, self.optimizers, self.zero)

    def fit(self, train: Tensor, held: Tensor) -> dict[str, Any]:
        """Train, and leave the parameters of the best held-out loss, or the last, in place.

        ``train`` and ``held`` are int64 and are cut into batches along their first dimension:
        windows of tokens, or their numbers. Returns steps taken, the best step, the held-out loss
        before, best and last, and the curve.

        Raises:
            RecipeError: a batch of fewer windows than processes and pieces.
        """
        keep_large()
        schedule, progress = self.schedule, self.progress
        pieces = self.processes * schedule.accumulate
        if min(schedule.batch, len(train)) < pieces:
            raise RecipeError(
                f"a batch of {min(schedule.batch, len(train))} windows cannot be shared by "
                f"{self.processes} processes in {schedule.accumulate} pieces each; raise batch or "
                "lower accumulate"
            )
        if not progress.resume():
            progress.start(self.check(held))
        first, start = progress.step, time.monotonic()
        best = schedule.keep == "best"
        patience = schedule.patience if best else math.inf
        while progress.step < schedule.steps and progress.waited < patience:
            rows = train[_batch(progress.step, len(train), schedule.batch, self.seed)]
            loss = self._step(rows, progress.step)
            progress.step += 1
            progress.seen.append(loss)
            numbers = {"loss": loss}
            if progress.step % schedule.check_every == 0 or progress.step == schedule.steps:
                progress.checked(self.check(held))
                numbers["held"] = progress.last
            done, seconds = progress.step - first, time.monotonic() - start
            numbers["tokens_per_s"] = done * len(rows) * self.length / max(seconds, 1e-9)
            numbers["seconds_left"] = (schedule.steps - progress.step) * seconds / done
            self.report(progress.step, schedule.steps, numbers)
        if best:
            progress.restore_best()
        return progress.summary()

    def check(self, held: Tensor) -> float:
        """The held-out loss, nats a token."""
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for rows in held.split(max(self.processes, self.schedule.batch)):
                mine = rows.tensor_split(self.processes)[distributed.rank()]
                asked = mine if len(mine) else rows[:1]  # all processes run, whether there is work
                with self._autocast():
                    value = self.model(asked, None)
                if len(mine):
                    sums += torch.tensor([value.item(), self.objective.count(mine, None)])
        total, count = distributed.total(sums).tolist()
        return total / count

    def release(self) -> None:
        """Leave the objective with whole parameters of its own, on the CPU."""
        if sharded.wanted():
            sharded.gather(self.objective)
        else:
            self.objective.cpu()

    def _step(self, rows: Tensor, step: int) -> float:
        for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
            waits = group["later"] and step < self.schedule.begin * self.schedule.steps
            group["lr"] = 0.0 if waits else self.schedule.rate(step)
        count = self.objective.count(rows, step)
        pieces = rows.tensor_split(self.processes * self.schedule.accumulate)
        mine = pieces[distributed.rank() :: self.processes]
        total = torch.zeros(1, dtype=torch.float64)
        for number, piece in enumerate(mine, start=1):
            with self._together(number == len(mine)):
                with self._autocast():
                    loss = self.model(piece, step)
                # Gradients are averaged over processes, and the sum is wanted.
                scaled = loss * (self.processes / count)
                if self.zero:
                    self.zero.backward(scaled, last=number == len(mine))
                else:
                    self.accelerator.backward(scaled)
            total += loss.item()
        if self.zero:
            self.zero.step()
        else:
            nn.utils.clip_grad_norm_(self.trained, self.schedule.clip)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return distributed.total(total).item() / count

    def _together(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients of a step's pieces are exchanged once, at the last."""
        waits = not last and not self.zero and hasattr(self.model, "no_sync")
        return self.model.no_sync() if waits else nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.zero:  # its engine does it
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.half)


class _Progress:
    """Where the training stands, in memory and in its state file."""

    STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer")
    NUMBERS = ("step", "waited", "best_step", "before", "best", "last", "curve")

    def __init__(
        self,
        path: Path,
        trained: list[Tensor],
        optimizers: list[torch.optim.Optimizer],
        zero: Zero | None = None,
    ) -> None:
        self.path, self.trained, self.zero = path, trained, zero
        self.mover = {p: o for o in optimizers for g in o.param_groups for p in g["params"]}
        self.step = self.waited = self.best_step = 0
        self.before = self.best = self.last = math.inf
        self.seen: list[float] = []  # losses since the last check
        self.curve: list[dict[str, float]] = []
        self.best_values: list[Tensor] = []

    def start(self, before: float) -> None:
        self.before = self.best = self.last = before
        self.curve = [{"step": 0, "held": round(before, 6)}]
        self._keep()

    def checked(self, held: float) -> None:
        self.last = held
        loss = sum(self.seen) / len(self.seen)
        self.curve.append({"step": self.step, "loss": round(loss, 6), "held": round(held, 6)})
        self.seen = []
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
            "curve": self.curve,
        }

    def _save(self) -> None:
        """All processes bring their shares; the first writes."""
        writer = None
        if not distributed.rank():
            numbers = {name: getattr(self, name) for name in self.NUMBERS}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            writer = SafetensorsWriter(self.path, {"progress": json.dumps(numbers)})
        for name, tensor in self._tensors():
            full = whole(tensor)
            if writer:
                writer.add(name, full)
        if writer:
            writer.close()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for i, parameter in enumerate(self.trained):
            yield f"{i}.now", parameter.detach()
            yield f"{i}.best", self.best_values[i]
            for key, value in self._state(parameter).items():  # empty without a gradient
                yield f"{i}.{key}", value

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        if self.zero:
            return self.zero.state(parameter)
        return self.mover[parameter].state[parameter]

    def resume(self) -> bool:
        if not self.path.exists():
            return False
        with safe_open(self.path, framework="pt") as file:
            for key, value in json.loads(file.metadata()["progress"]).items():
                setattr(self, key, value)
            held = set(file.keys())
            for i, parameter in enumerate(self.trained):
                now = like(parameter, file.get_tensor(f"{i}.now"))
                with torch.no_grad():
                    parameter.copy_(now)
                self.best_values.append(like(parameter, file.get_tensor(f"{i}.best")))
                state = {
                    key: like(parameter, file.get_tensor(f"{i}.{key}"))
                    for key in self.STATES
                    if f"{i}.{key}" in held
                }
                if f"{i}.step" in held:
                    state["step"] = file.get_tensor(f"{i}.step")
                if self.zero:
                    self.zero.restore(parameter, now, state)
                else:
                    self.mover[parameter].state[parameter] = state
        return True


def _optimizers(
    named: list[tuple[str, Tensor]],
    weight_decay: float,
    later: Callable[[str], bool],
    matrix: Callable[[str], bool],
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for matrices."""
    made: list[torch.optim.Optimizer] = []
    kinds: list[tuple[Any, bool]] = [(torch.optim.AdamW, False), (Muon, True)]
    for kind, moves in kinds:
        mine = [(name, p) for name, p in named if matrix(name) is moves]
        groups = [
            {"params": [p for name, p in mine if later(name) is second], "later": second}
            for second in (False, True)
        ]
        groups = [group for group in groups if group["params"]]
        if groups:
            made.append(kind(groups, lr=0.0, weight_decay=weight_decay))
    return made


def _batch(step: int, count: int, size: int, seed: int) -> Tensor:
    """Indices of the windows of one step: every window once an epoch, in a seeded order."""
    size = min(size, count)
    per_epoch = count // size
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)[place * size : (place + 1) * size]


def _has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
