"""What pruning methods that read data share: magnitude pruning is what they fall back to."""

from __future__ import annotations

from abc import ABC

from compress.compressors.base import CalibratedCompressor
from compress.compressors.pruning.magnitude import Magnitude
from compress.compressors.pruning.pruner import Pruner


class CalibratedPruner(Pruner, CalibratedCompressor, ABC):
    """Pruning by what the layer puts out on the calibration text."""

    def data_free(self) -> Magnitude:
        return Magnitude.model_validate({"sparsity": self.sparsity, "pattern": self.pattern})
