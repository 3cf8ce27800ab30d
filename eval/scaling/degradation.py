"""What a method loses by its setting: ln ΔL = c − p·b − a·ln N, and its like.

ΔL is the nll of a compressed model minus its original's. With bits b it falls exponentially
(arXiv 2411.17691, 2411.04330), or with the steps of the grid, (2^b − 1)^−p: the error of a rounded
weight is proportional to its step, and the loss to the square of the error. With the share s of
weights removed (sparsity; 1 − ratio of rank) it rises as a power s^p, exponentially e^(p·s), or as
the odds (s/(1 − s))^p. Of these forms the one is taken that best predicts measurements that it was
not fitted to. Groups of weights that share a scale, and the size of the original, join as powers
where they were varied.

Measurements within two standard errors of no loss have no logarithm to speak of and are left out,
the others count less the less sure they are. Predictions stay within the settings that were
measured, and within twice their sizes; simulated with four or five settings, 93 to 95 of 100 new
measurements fall into their 95% intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress.errors import DataError
from eval.scaling.equivalent import count
from eval.scaling.law import DRAWS, REACH
from eval.scaling.robust import Array, linear

DELTA = 0.1  # of ln ΔL: settings scatter by a tenth about the best of laws
FORMS = {
    "bits": ("exponential", "steps"),
    "sparsity": ("power", "exponential", "odds"),
    "ratio": ("power", "exponential", "odds"),
}
SETTINGS = tuple(FORMS)


@dataclass(frozen=True)
class Loss:
    """What one compressed checkpoint lost."""

    name: str
    method: str
    """Everything of its recipe but the setting, as a name: ``rtn``."""
    setting: str
    """bits, sparsity or ratio."""
    value: float
    group: float
    """Weights that share a scale; 1 where there is no such thing."""
    parameters: int
    """Of the dense original."""
    delta: float
    """nats/token more than the original."""
    stderr: float
    """Paired."""
    size: float = 0.0
    """Bytes on disk."""

    @property
    def seen(self) -> bool:
        """Whether there is a loss to speak of."""
        return self.delta > 2 * self.stderr and self.delta > 0


@dataclass(frozen=True)
class Prediction:
    """ΔL at a setting: the estimate and the 95% interval of a new measurement, nats/token."""

    method: str
    setting: str
    value: float
    group: float
    parameters: float
    delta: float
    low: float
    high: float


@dataclass(frozen=True)
class Degradation:
    """ln ΔL of one method, linear in its coefficients."""

    method: str
    setting: str
    form: str
    names: tuple[str, ...]
    """c, p, and where varied g (of ln group) and a (of ln N, falling)."""
    coefficients: Array
    """float64 [names]"""
    draws: Array
    """float64 [draws, names]: refitted to checkpoints drawn with replacement."""
    scatter: float
    """Standard deviation of ln ΔL about the law, each left out in turn."""
    losses: tuple[Loss, ...]
    """What it was fitted to."""
    unseen: tuple[Loss, ...]
    """Left out, for their loss is within the noise."""

    def predict(self, value: float, *, group: float | None = None, parameters: float | None = None,
                seed: int = 0) -> Prediction:  # fmt: skip
        """ΔL at a setting, group and size; without these, at the most common.

        Raises:
            DataError: it lies outside what was measured, or beyond twice the sizes.
        """
        group = _common([loss.group for loss in self.losses]) if group is None else group
        if parameters is None:
            parameters = _common([loss.parameters for loss in self.losses])
        self._check(value, group, parameters)
        features = _features(self.form, self.setting, self.names, [(value, group, parameters)])
        delta = float(np.exp(features[0] @ self.coefficients))
        low, high = np.percentile(self.samples(value, group, parameters, seed), [2.5, 97.5])
        return Prediction(
            self.method, self.setting, value, group, parameters, delta, float(low), float(high)
        )

    @property
    def settings(self) -> tuple[float, float]:
        """The least and the most that was measured, with or without a loss to speak of."""
        values = [loss.value for loss in (*self.losses, *self.unseen)]
        return min(values), max(values)

    def samples(self, value: float, group: float, parameters: float, seed: int = 0) -> Array:
        """What a new measurement of ΔL might be, nats/token [draws]; nothing is refused.

        Coefficients of the bootstrap, and a scatter of Student's t: that of few checkpoints is
        itself not well known.
        """
        features = _features(self.form, self.setting, self.names, [(value, group, parameters)])
        degrees = max(1, len(self.losses) - len(self.names))
        noise = np.random.default_rng(seed).standard_t(degrees, len(self.draws))
        return np.exp(self.draws @ features[0] + self.scatter * noise)

    def reaches(self, parameters: float) -> bool:
        """Whether models of this size may be asked for."""
        sizes = [loss.parameters for loss in self.losses]
        if "a" not in self.names:
            return abs(parameters / sizes[0] - 1) < 0.01
        return min(sizes) / REACH <= parameters <= max(sizes) * REACH

    def _check(self, value: float, group: float, parameters: float) -> None:
        low, high = self.settings
        groups = [loss.group for loss in self.losses]
        sizes = [loss.parameters for loss in self.losses]
        if not low <= value <= high:
            raise DataError(
                f"{self.method}: {self.setting}={value:g} is outside what was measured, "
                f"{low:g} to {high:g}; compress and evaluate a model there"
            )
        if not min(groups) <= group <= max(groups):
            raise DataError(
                f"{self.method}: group={group:g} is outside what was measured, "
                f"{min(groups):g} to {max(groups):g}"
            )
        if "a" not in self.names and not self.reaches(parameters):
            raise DataError(
                f"{self.method}: only models of {count(sizes[0])} parameters were measured, so "
                f"nothing is known of {count(parameters)}; give checkpoints of several sizes"
            )
        if not self.reaches(parameters):
            raise DataError(
                f"{self.method}: {count(parameters)} parameters is beyond {REACH:g} times the "
                f"sizes that were measured, {count(min(sizes))} to {count(max(sizes))}"
            )


def fit(losses: Sequence[Loss], *, draws: int = DRAWS, seed: int = 0) -> Degradation:
    """The law of one method: of its forms the one that predicts left-out measurements best.

    Raises:
        DataError: there are too few settings.
    """
    seen = [loss for loss in losses if loss.seen]
    names = _names(seen)
    settings = len({loss.value for loss in seen})
    if settings < 3 or len(seen) < len(names) + 1:
        raise DataError(
            f"{losses[0].method}: a law needs three settings with a measurable loss, and "
            f"{len(names) + 1} checkpoints; here are {settings} and {len(seen)}"
        )
    setting = seen[0].setting
    points = [(loss.value, loss.group, float(loss.parameters)) for loss in seen]
    y = np.log([loss.delta for loss in seen])
    noise = np.array([loss.stderr / loss.delta for loss in seen])
    weights = DELTA**2 / (DELTA**2 + noise**2)
    tried = []
    for form in FORMS[setting]:
        X = _features(form, setting, names, points)
        left_out = weights * (1 - np.eye(len(y)))
        errors = y - np.einsum("np,np->n", X, linear(X, y, left_out, DELTA))
        tried.append((float(np.average(np.abs(errors), weights=weights)), form, X, errors))
    _, form, X, errors = min(tried, key=lambda fitted: fitted[0])
    counts = _resample(X, draws, np.random.default_rng(seed))
    return Degradation(
        seen[0].method,
        setting,
        form,
        names,
        linear(X, y, weights[None], DELTA)[0],
        linear(X, y, counts * weights, DELTA),
        float(np.sqrt(np.average(errors**2, weights=weights))),
        tuple(seen),
        tuple(loss for loss in losses if not loss.seen),
    )


def held_out(losses: Sequence[Loss]) -> tuple[list[Loss], list[Loss]]:
    """Those to fit, and a third to predict, by lot; none at an end of the settings."""
    seen = sorted((x for x in losses if x.seen), key=lambda x: (x.value, x.group, x.parameters))
    ends = {min(x.value for x in seen), max(x.value for x in seen)} if seen else set()
    inner = [loss for loss in seen if loss.value not in ends]
    lots = np.random.default_rng(0).permutation(len(inner))
    chosen = [inner[i] for i in lots[: round(len(seen) / 3)]]
    return [loss for loss in seen if loss not in chosen], chosen


def _names(losses: Sequence[Loss]) -> tuple[str, ...]:
    names = ["c", "p"]
    if len({loss.group for loss in losses}) > 1:
        names.append("g")
    if len({loss.parameters for loss in losses}) > 1:
        names.append("a")
    return tuple(names)


def _features(form: str, setting: str, names: Sequence[str],
              points: Sequence[tuple[float, float, float]]) -> Array:  # fmt: skip
    """[points, names] of (setting, group, parameters)."""
    value, group, parameters = np.array(points, float).T
    if setting == "bits":
        x = -np.log(2**value - 1) if form == "steps" else -value
    else:
        removed = 1 - value if setting == "ratio" else value
        x = {
            "power": np.log(removed),
            "exponential": removed,
            "odds": np.log(removed / (1 - removed)),
        }[form]
    columns = {"c": np.ones_like(x), "p": x, "g": np.log(group), "a": -np.log(parameters)}
    return np.stack([columns[name] for name in names], axis=1)


def _resample(X: Array, draws: int, generator: np.random.Generator) -> Array:
    """How often each checkpoint is drawn, [draws, n]; what is drawn determines the law."""
    found: list[Array] = []
    count = len(X)
    centred = (X - X.mean(axis=0)) / np.maximum(X.std(axis=0), 1e-12)
    centred[:, 0] = 1
    while len(found) < draws:
        chosen = generator.integers(0, count, count)
        if np.linalg.svd(centred[np.unique(chosen)], compute_uv=False)[-1:] > 0.1 and (
            len(np.unique(chosen)) >= X.shape[1]
        ):
            found.append(np.bincount(chosen, minlength=count).astype(float))
    return np.array(found)


def _common(values: Sequence[float]) -> float:
    return max(sorted(set(values)), key=list(values).count)
