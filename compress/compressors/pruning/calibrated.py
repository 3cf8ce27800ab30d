"""What pruning methods that read data share: magnitude pruning is what they fall back to."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from compress.compressors.base import CalibratedCompressor
from compress.compressors.pruning.allocation import by_error, by_outliers
from compress.compressors.pruning.magnitude import Magnitude
from compress.compressors.pruning.pruner import Pruner
from compress.problem import LayerProblem

Allocation = Literal["uniform", "error", "outliers"]
ALLOCATION = "the share holds for each matrix, or is shared out between all"


class CalibratedPruner(Pruner, CalibratedCompressor, ABC):
    """Pruning by what the layer puts out on the calibration text."""

    allocation: Allocation = Field("uniform", description=ALLOCATION)
    _shares: dict[str, float] = PrivateAttr(default_factory=dict)  # by site, from prepare

    @model_validator(mode="before")
    @classmethod
    def _pattern_is_uniform(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("pattern") is None:
            return raw
        if raw.get("allocation", "uniform") != "uniform":
            raise ValueError("pattern decides the sparsity of every matrix; drop 'allocation'")
        return {**raw, "allocation": "uniform"}

    def prepare(self, problems: Callable[[], Iterable[LayerProblem]]) -> CalibratedPruner:
        """Share the sparsity out between all sites, from their problems in the unpruned model."""
        if self.allocation == "uniform":
            return self
        share_out = by_error if self.allocation == "error" else by_outliers
        prepared = self.model_copy()
        prepared._shares = share_out(problems(), self.share)
        return prepared

    def at_site(self, name: str) -> CalibratedPruner:
        if name not in self._shares:
            return self
        return self.model_copy(update={"sparsity": self._shares[name]})

    def data_free(self) -> Magnitude:
        return Magnitude.model_validate({"sparsity": self.sparsity, "pattern": self.pattern})
