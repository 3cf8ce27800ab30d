"""What a setting that was not run would give: ``bits=3,group=64,parameters=2M``."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from compress.errors import DataError, RecipeError, did_you_mean
from eval.scaling.degradation import SETTINGS, Degradation, Prediction
from eval.scaling.equivalent import count
from eval.scaling.ladder import METRIC, parameters
from eval.scaling.study import Study

KEYS = (*SETTINGS, "group", "parameters")
UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}


@dataclass(frozen=True)
class Answer:
    """A predicted loss, and the nll it makes with what the dense model has (or would have)."""

    loss: Prediction
    nll: float
    low: float
    """Of the 95% interval of a new measurement."""
    high: float


def parse(text: str) -> dict[str, float]:
    """``bits=3,parameters=2M`` as numbers.

    Raises:
        RecipeError: a key is unknown, a value is no number, or there is no setting or several.
    """
    found = {}
    for item in text.split(","):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in KEYS:
            raise RecipeError(f"--predict {text}: unknown '{key}'" + did_you_mean(key, KEYS))
        number = re.fullmatch(r"([\d.]+(?:e\d+)?)([KMB]?)", value.upper().replace("E", "e"))
        try:
            found[key] = float(number[1]) * UNITS[number[2]] if number else float("nan")
        except ValueError:
            found[key] = float("nan")
        if not np.isfinite(found[key]):
            raise RecipeError(f"--predict {text}: '{value}' is not a number, e.g. bits=3 or 2M")
    if len(found.keys() & set(SETTINGS)) != 1:
        raise RecipeError(f"--predict {text}: give one of {', '.join(SETTINGS)}")
    return found


def answers(study: Study, text: str) -> list[Answer]:
    """What every law of the setting in ``text`` says.

    Raises:
        RecipeError: see ``parse``.
        DataError: no law is about this setting, or one would have to extrapolate.
    """
    asked = parse(text)
    (setting,) = asked.keys() & set(SETTINGS)
    laws = [law for law in study.laws if law.setting == setting]
    if not laws:
        reasons = "; ".join(study.notes) or "no checkpoint varies it"
        raise DataError(f"--predict {text}: there is no law of {setting}: {reasons}")
    return [
        _answer(study, law, asked[setting], asked.get("group"), asked.get("parameters"))
        for law in laws
    ]


def _answer(
    study: Study, law: Degradation, value: float, group: float | None, N: float | None
) -> Answer:
    loss = law.predict(value, group=group, parameters=N)
    dense, draws = _dense(study, loss.parameters)
    low, high = np.percentile(
        draws + law.samples(value, loss.group, loss.parameters, seed=1), [2.5, 97.5]
    )
    return Answer(loss, dense + loss.delta, float(low), float(high))


def _dense(study: Study, N: float) -> tuple[float, np.ndarray]:
    """nats/token of a dense model of N parameters: measured, else by the ladder."""
    for item in study.compressed:
        if abs(N / parameters(item.original) - 1) < 0.01:
            nll = item.original.value(METRIC) or 0.0
            return nll, np.full(1, nll)
    if study.ladder is None:
        raise DataError(f"no dense model of {count(N)} parameters was measured, nor a ladder")
    low, high = study.ladder.curve.limits
    if not low <= N <= high:
        raise DataError(
            f"the ladder tells of {count(low)} to {count(high)} parameters, not of {count(N)}"
        )
    return study.ladder.curve.nll(N)
