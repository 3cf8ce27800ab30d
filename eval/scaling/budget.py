"""What is best within so many bytes: a setting for one model, or bits and size together.

A checkpoint's bytes are linear in its setting (and, for quantization, in 1/group), so the bytes of
settings that were not made are known, and the degradation law says what they lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.scaling.degradation import Degradation, Loss, Prediction
from eval.scaling.law import Curve
from eval.scaling.robust import Array

DENSE = 16  # bits of a weight that nothing was done to


@dataclass(frozen=True)
class Choice:
    """A setting that fits, and what it would lose."""

    prediction: Prediction
    size: float
    """Bytes."""


@dataclass(frozen=True)
class Mix:
    """A model of so many parameters at so many bits."""

    bits: float
    parameters: float
    nll: float
    low: float
    high: float


def best(laws: Sequence[Degradation], budget: float, parameters: int) -> list[Choice]:
    """For each method and group the best setting within ``budget`` bytes, the best of all first."""
    found = []
    for law in laws:
        losses = [loss for loss in law.losses if loss.parameters == parameters and loss.size]
        values = [loss.value for loss in losses]
        if len(set(values)) < 2:
            continue
        if law.setting == "bits":
            candidates = np.arange(np.ceil(min(values)), max(values) + 1)
        else:
            candidates = np.round(np.arange(min(values), max(values) + 0.005, 0.01), 2)
        for group in sorted({loss.group for loss in losses}):
            fitting = [
                Choice(law.predict(float(value), group=group, parameters=parameters), size)
                for value, size in zip(candidates, _bytes(losses, candidates, group), strict=True)
                if size <= budget
            ]
            if fitting:
                found.append(min(fitting, key=lambda choice: choice.prediction.delta))
    return sorted(found, key=lambda choice: choice.prediction.delta)


def _bytes(losses: Sequence[Loss], values: Array, group: float) -> Array:
    """Bytes at ``values``; the line through what was measured."""
    measured = _columns([x.value for x in losses], [x.group for x in losses])
    line = np.linalg.lstsq(measured, np.array([x.size for x in losses]), rcond=None)[0]
    return _columns(values, np.full(len(values), group)) @ line


def _columns(values: Sequence[float] | Array, groups: Sequence[float] | Array) -> Array:
    value, group = np.array(values, float), np.array(groups, float)
    return np.stack([np.ones_like(value), value, 1 / group], axis=1)


def best_bits(law: Degradation, curve: Curve, budget: float) -> list[Mix]:
    """Models that take just ``budget`` bytes, at each number of bits and dense; the best first.

    Empty unless the law knows several sizes. Fewer bits buy more parameters. Sizes beyond what
    law and curve may be asked for are left out.
    """
    losses = [loss for loss in law.losses if loss.size]
    if "a" not in law.names or law.setting != "bits":
        return []
    group = law.predict(losses[0].value).group
    each = np.array([8 * loss.size / loss.parameters for loss in losses])
    line = np.linalg.lstsq(_bits(losses), each, rcond=None)[0]
    sizes = np.geomspace(*curve.limits, 400)
    values = [loss.value for loss in losses]
    found = []
    for bits in [*np.arange(np.ceil(min(values)), max(values) + 1), DENSE]:
        point = [Loss("", "", "bits", float(bits), group, int(N), 0, 0) for N in sizes]
        per = np.full(len(sizes), DENSE) if bits == DENSE else _bits(point) @ line
        N = float(np.interp(8 * budget, sizes * per, sizes, left=0, right=0))
        if not N or not law.reaches(N):
            continue
        dense, draws = curve.nll(N)
        if bits != DENSE:
            lost = law.predict(float(bits), group=group, parameters=N)
            dense, draws = dense + lost.delta, draws + law.samples(float(bits), group, N)
        low, high = np.percentile(draws, [2.5, 97.5])
        found.append(Mix(float(bits), N, dense, float(low), float(high)))
    return sorted(found, key=lambda mix: mix.nll)


def _bits(losses: Sequence[Loss]) -> Array:
    """[losses, 5] in which bits a parameter are linear: the share of embeddings falls with ln N."""
    value = np.array([loss.value for loss in losses])
    small = np.log([loss.parameters for loss in losses])
    group = np.array([1 / loss.group for loss in losses])
    return np.stack([np.ones_like(value), value, group, small, value * small], axis=1)
