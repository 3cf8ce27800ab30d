"""How fast a checkpoint runs, beside its original in the same process.

The two take turns (A B A B …), so that a machine that slows down or warms up does it to both, and
medians are reported. One thread by default: two busy threads on two shared cores can collapse.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.errors import NotMeasurable
from compress.objective import context_length, family
from eval.metrics.base import Context, Metric
from eval.metrics.examples import made_up
from eval.results import Result

Run = Callable[[], float]  # runs once, returns seconds


@dataclass(frozen=True)
class _Speed(Metric):
    batch: int = 1
    prompt: int = 128
    repeats: int = 5

    unit = "tokens/s"
    higher_is_better = True
    beside_original = True

    def setup(self, context: Context) -> dict[str, Any]:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return {
            "threads": context.settings.threads,
            "batch": self.batch,
            "prompt": self._prompt(context),
            "repeats": self.repeats,
            "device": device,
        }

    def _prompt(self, context: Context) -> int:
        return min(self.prompt, context.length)

    def _compare(
        self, context: Context, make: Callable[[PreTrainedModel], Run], tokens: int
    ) -> Result:
        """Time the checkpoint and its original; each run is ``tokens`` long."""
        runs = {"checkpoint": make(context.model)}
        if context.reference is not None and not context.is_original:
            runs["original"] = make(context.reference)
        with threads(context.settings.threads), torch.inference_mode():
            seconds = take_turns(runs, self.repeats)
        speeds = {name: [tokens / s for s in times] for name, times in seconds.items()}
        own = speeds["checkpoint"]
        value = statistics.median(own)
        detail: dict[str, Any] = {"min": min(own), "max": max(own)}
        if "original" in speeds:
            original = statistics.median(speeds["original"])
            detail |= {"original": original, "ratio": value / original,
                       "original_min": min(speeds["original"]),
                       "original_max": max(speeds["original"])}  # fmt: skip
        return self.result(context, value, detail=detail)


@dataclass(frozen=True)
class Prefill(_Speed):
    """Tokens of a prompt that are read in a second: one forward pass of [batch, prompt]."""

    name = "prefill_tokens_per_s"

    def measure(self, context: Context) -> Result:
        length = self._prompt(context)

        def make(model: PreTrainedModel) -> Run:
            examples = made_up(model, batch=self.batch, length=length)
            return lambda: timed(model, lambda: examples.call(model, slice(None)))

        return self._compare(context, make, self.batch * length)


@dataclass(frozen=True)
class Decode(_Speed):
    """Tokens written in a second: ``steps`` greedy steps of one token after a prompt, with the
    key-value cache; the prompt is not timed."""

    steps: int = 16

    name = "decode_tokens_per_s"

    def setup(self, context: Context) -> dict[str, Any]:
        return super().setup(context) | {"steps": self.steps}

    def _prompt(self, context: Context) -> int:
        limit = context_length(context.config) or self.prompt + self.steps
        return max(1, min(self.prompt, limit - self.steps))

    def measure(self, context: Context) -> Result:
        name = type(context.model).__name__
        if family(context.model) != "causal":
            raise NotMeasurable(
                f"{name} does not write text token by token; "
                "its speed can be measured by prefill_tokens_per_s"
            )
        length = self._prompt(context)

        def make(model: PreTrainedModel) -> Run:
            prompt = made_up(model, batch=self.batch, length=length).inputs["input_ids"]
            return lambda: self._decode(model, prompt.to(model.device))

        return self._compare(context, make, self.batch * self.steps)

    def _decode(self, model: PreTrainedModel, prompt: torch.Tensor) -> float:
        output = model(input_ids=prompt, use_cache=True)
        if getattr(output, "past_key_values", None) is None:
            raise NotMeasurable(
                f"{type(model).__name__} has no key-value cache; "
                "its speed can be measured by prefill_tokens_per_s"
            )

        def write() -> None:
            step = output
            for _ in range(self.steps):
                token = step.logits[:, -1:].argmax(-1)
                step = model(input_ids=token, past_key_values=step.past_key_values, use_cache=True)

        return timed(model, write)


def take_turns(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat, by name; every run is warmed up once, then they take turns."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(run())
    return seconds


def timed(model: PreTrainedModel, work: Callable[[], Any]) -> float:
    """Seconds that ``work`` takes; a GPU is waited for."""
    _wait(model)
    start = time.perf_counter()
    work()
    _wait(model)
    return time.perf_counter() - start


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Give torch ``count`` CPU threads, and what it had before at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
