"""What pruning methods that read data share: magnitude pruning is what they fall back to."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable
from typing import Literal

from pydantic import Field, PrivateAttr, model_validator

from compress.compressors.base import CalibratedCompressor
from compress.compressors.pruning.allocation import by_error, by_outliers
from compress.compressors.pruning.magnitude import Magnitude
from compress.compressors.pruning.pruner import Pruner
from compress.problem import LayerProblem
from compress.weights import Weight


class CalibratedPruner(Pruner, CalibratedCompressor, ABC):
    """Pruning by what the layer puts out on the calibration text."""

    allocation: Literal["uniform", "error", "outliers"] = Field(
        "uniform", description="the share holds for each matrix, or is shared out between all"
    )
    _shares: dict[str, float] = PrivateAttr(default_factory=dict)  # by site, from prepare

    @model_validator(mode="after")
    def _pattern_is_uniform(self) -> CalibratedPruner:
        if self.pattern is not None and self.allocation != "uniform":
            raise ValueError("pattern decides the sparsity of every matrix; drop 'allocation'")
        return self

    def prepare(self, problems: Callable[[], Iterable[LayerProblem]]) -> CalibratedPruner:
        """Share the sparsity out between all sites, from their problems in the unpruned model."""
        if self.allocation == "uniform":
            return self
        share_out = by_error if self.allocation == "error" else by_outliers
        prepared = self.model_copy()
        prepared._shares = share_out(problems(), self.share)
        return prepared

    def best(self, problem: LayerProblem) -> tuple[Weight, str]:
        if problem.name not in self._shares:
            return super().best(problem)
        alone = self.model_copy(update={"sparsity": self._shares[problem.name]})
        alone._shares = {}
        return alone.best(problem)

    def data_free(self) -> Magnitude:
        return Magnitude.model_validate({"sparsity": self.sparsity, "pattern": self.pattern})
