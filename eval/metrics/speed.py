"""How fast a checkpoint runs, beside its original in the same process.

The two take turns (A B A B …), so that a machine that slows down or warms up does it to both; the
ratio is the median over turns, and of both medians and quartiles are reported. Several sizes of
batch and prompt are timed, as a format that is fast for one token may be slow for many. One thread
by default: two busy threads on two shared cores can collapse.
"""

from __future__ import annotations

import statistics
import time
from abc import abstractmethod
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
    """``sizes`` are (batch, prompt): the first gives the value, ``detail`` has them all."""

    sizes: tuple[tuple[int, int], ...] = ()
    repeats: int = 5

    unit = "tokens/s"
    higher_is_better = True
    beside_original = True

    @abstractmethod
    def _longest(self, context: Context) -> int:
        """The longest prompt that the model takes."""

    @abstractmethod
    def _run(self, model: PreTrainedModel, batch: int, prompt: int) -> Run:
        """What is timed at one size."""

    @abstractmethod
    def _tokens(self, batch: int, prompt: int) -> int:
        """Tokens read or written in one run."""

    def setup(self, context: Context) -> dict[str, Any]:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return {
            "threads": context.settings.threads,
            "sizes": self._sizes(context),
            "repeats": self.repeats,
            "device": device,
        }

    def _sizes(self, context: Context) -> list[list[int]]:
        longest = self._longest(context)
        found = [[batch, min(prompt, longest)] for batch, prompt in self.sizes]
        return [size for i, size in enumerate(found) if size not in found[:i]]

    def measure(self, context: Context) -> Result:
        self._check(context.model)
        sizes = self._sizes(context)
        timed_sizes = []
        for batch, prompt in sizes:
            timed_sizes.append(self._time(context, batch, prompt))
            context.watch(len(timed_sizes), len(sizes))
        first = timed_sizes[0]
        detail = {key: value for key, value in first.items() if key not in ("batch", "prompt")}
        return self.result(context, first["median"], detail=detail | {"sizes": timed_sizes})

    def _check(self, model: PreTrainedModel) -> None:
        """Refuse a model that cannot do it."""

    def _time(self, context: Context, batch: int, prompt: int) -> dict[str, Any]:
        """Medians and quartiles of the checkpoint's tokens a second, and of its original's."""
        runs = {"checkpoint": self._run(context.model, batch, prompt)}
        if context.reference is not None and not context.is_original:
            runs["original"] = self._run(context.reference, batch, prompt)
        with threads(context.settings.threads), torch.inference_mode():
            seconds = take_turns(runs, self.repeats)
        tokens = self._tokens(batch, prompt)
        speeds = {name: [tokens / s for s in times] for name, times in seconds.items()}
        found = {"batch": batch, "prompt": prompt, **_spread(speeds["checkpoint"])}
        if "original" in speeds:
            original = _spread(speeds["original"])
            found["original"] = original["median"]
            pairs = zip(seconds["original"], seconds["checkpoint"], strict=True)
            found["ratio"] = statistics.median(other / own for other, own in pairs)
            found |= {f"original_{end}": original[end] for end in ("low", "high")}
        return found


def _spread(speeds: list[float]) -> dict[str, float]:
    """The median and the quartiles."""
    if len(speeds) == 1:
        return dict.fromkeys(("median", "low", "high"), speeds[0])
    low, median, high = statistics.quantiles(speeds, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


@dataclass(frozen=True)
class Prefill(_Speed):
    """Tokens of a prompt that are read in a second: one forward pass of [batch, prompt]."""

    sizes: tuple[tuple[int, int], ...] = ((1, 128), (1, 32), (8, 128))

    name = "prefill_tokens_per_s"

    def _longest(self, context: Context) -> int:
        return context.length

    def _tokens(self, batch: int, prompt: int) -> int:
        return batch * prompt

    def _run(self, model: PreTrainedModel, batch: int, prompt: int) -> Run:
        examples = made_up(model, batch=batch, length=prompt)
        return lambda: timed(model, lambda: examples.call(model, slice(None)))


@dataclass(frozen=True)
class Decode(_Speed):
    """Tokens written in a second: ``steps`` greedy steps of one token after a prompt, with the
    key-value cache; the prompt is not timed."""

    sizes: tuple[tuple[int, int], ...] = ((1, 128), (1, 32), (8, 128))
    steps: int = 16

    name = "decode_tokens_per_s"

    def setup(self, context: Context) -> dict[str, Any]:
        return super().setup(context) | {"steps": self.steps}

    def _longest(self, context: Context) -> int:
        limit = context_length(context.config)
        return context.length if limit is None else max(1, min(context.length, limit - self.steps))

    def _tokens(self, batch: int, prompt: int) -> int:
        return batch * self.steps

    def _check(self, model: PreTrainedModel) -> None:
        if family(model) != "causal":
            raise NotMeasurable(
                f"{type(model).__name__} does not write text token by token; "
                "its speed can be measured by prefill_tokens_per_s"
            )

    def _run(self, model: PreTrainedModel, batch: int, prompt: int) -> Run:
        tokens = made_up(model, batch=batch, length=prompt).inputs["input_ids"]
        return lambda: self._decode(model, tokens.to(model.device))

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
