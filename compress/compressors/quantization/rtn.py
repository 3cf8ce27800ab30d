"""Round to nearest, on the best grid."""

from __future__ import annotations

from compress.compressors.quantization.packed import PackedIntegers
from compress.problem import LayerProblem
from compress.weights import Quantized


class RTN(PackedIntegers):
    """Round each weight to the nearest point of a grid whose error is least (see grid.py).

    ŵ = s·(clip(round(w/s) + z, 0, 2^b − 1) − z), one scale s and zero-point z per group of inputs
    of a row, searched to minimise ‖W − Ŵ‖² (after NeUQI, arXiv 2505.17595; min-max scales are the
    starting point of that search). Stored packed, b bits a weight plus 16 (+ b) a group.
    """

    def solve(self, problem: LayerProblem) -> Quantized:
        W = problem.W
        grid = self.grid(W, problem)
        return self.pack(grid.codes(W), grid, problem)
